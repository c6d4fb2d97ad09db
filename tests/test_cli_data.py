from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from mars.cli.data import main
from mars.data import Dataset
from tests.data.conftest import list_again

FFMPEG = "" if shutil.which("ffmpeg") else " without FFmpeg"
NAMES = [f"{instrument}-{pitch:03d}-100" for instrument in ("bass_electronic_018", "flute_acoustic_002")
         for pitch in (60, 72)]  # fmt: skip


@pytest.fixture
def notes(tmp_path):
    """A folder that is NSynth and can be read as any folder as well."""
    (tmp_path / "notes" / "audio").mkdir(parents=True)
    for name in NAMES:
        audio = 0.5 * np.sin(0.1 * np.arange(64_000))
        soundfile.write(tmp_path / "notes" / "audio" / f"{name}.wav", audio, 16_000)
    return tmp_path / "notes"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", [[], ["nsynth"], ["folder"], ["soundfont"], ["info"]])
def test_help(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("command", ["nsynth", "folder"])
def test_packing_and_info(notes, tmp_path, command):
    result = run(command, notes, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "4 notes of 2 instruments (3 train, 1 valid, 0 test)" in result.output
    assert "held out: 1 of 4 notes for validation, since 2 instruments are few" in result.output
    assert len(Dataset.open(tmp_path / "out")) == 4
    result = run("info", tmp_path / "out", "--verify")
    assert result.exit_code == 0
    assert "MIDI 60 to 72" in result.output
    assert "every checksum is right" in result.output
    assert "flute" in result.output
    (tmp_path / "out" / "audio.i16").write_bytes(bytes(4 * 128_000))
    assert run("info", tmp_path / "out").exit_code == 0
    result = run("info", tmp_path / "out", "--verify")
    assert result.exit_code == 2
    assert "differs from its checksum" in result.output


def test_the_end_and_info_say_what_was_done_and_left_out(tmp_path):
    folder = tmp_path / "in"
    for i in range(30):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / "ab"[i % 2] / f"{i}.wav", 0.5 * np.sin(0.1 * np.arange(4000)), 16_000)
    soundfile.write(folder / "long.wav", 2 * np.sin(0.1 * np.arange(36_000)), 8000, subtype="FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(4000), 16_000)
    (folder / "text.wav").write_text("hello")
    (folder / "readme.txt").write_text("hello")
    (folder / "._a.wav").write_text("hello")
    for command in (("folder", folder, "--allow-bad", "0.1", "--out"), ("info",), ("info", "--verify")):
        result = run(*command, tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert result.output.splitlines()[:8] == [
            f"{tmp_path / 'out'}: 31 notes of 3 instruments (28 train, 3 valid, 0 test)",
            "held out: 3 of 31 notes for validation, since 3 instruments are few",
            "1 cut to 4 s",
            "30 padded with silence to 4 s",
            "1 resampled to 16,000 Hz",
            "1 made quieter, to stay within full scale",
            f"left out: 2 (1 silent, 1 unreadable{FFMPEG}); see {tmp_path / 'out' / 'bad_files.jsonl'}",
            "other files, not read: 1 .txt, 1 hidden",
        ]


@pytest.mark.parametrize(("by", "splits"), [("instruments", "2 train, 2 valid"), ("none", "4 train, 0 valid")])
def test_what_is_held_out_can_be_chosen(notes, tmp_path, by, splits):
    result = run("folder", notes, "--out", tmp_path / "out", "--hold-out", by)
    assert f"({splits}, 0 test)" in result.output
    assert run("folder", notes, "--out", tmp_path / "x", "--hold-out", "some").exit_code == 2


def test_instruments_of_nsynth_are_split_where_that_is_asked_for(notes, tmp_path):
    result = run("nsynth", notes, "--out", tmp_path / "out", "--split", "instrument")
    assert "(2 train, 2 valid, 0 test)" in result.output


def test_reasons_in_a_strangers_dataset_do_not_steer_the_terminal(notes, tmp_path):
    run("folder", notes, "--out", tmp_path / "out")
    (tmp_path / "out/bad_files.jsonl").write_text(json.dumps({"file": "x", "reason": "\x1b[2Jgone\n"}) + "\n")
    list_again(tmp_path / "out", "bad_files.jsonl")
    result = run("info", tmp_path / "out")
    assert result.exit_code == 0
    assert r"left out: 1 (1 \x1b[2Jgone\n)" in result.output


def test_info_of_the_built_in_notes():
    result = run("info")
    assert result.exit_code == 0
    assert "licence MIT" in result.output
    assert "vocal" in result.output


def test_too_many_bad_files_exit_3(notes, tmp_path):
    (notes / "audio" / "vocal_acoustic_001-060-100.wav").write_text("no audio")
    result = run("nsynth", notes, "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert "1 of 5 files are bad" in result.output
    assert not (tmp_path / "out").exists()
    listed = json.loads((tmp_path / "out.bad_files.jsonl").read_text())
    assert listed["file"] == "vocal_acoustic_001-060-100"
    assert run("nsynth", notes, "--out", tmp_path / "out", "--allow-bad", "0.2").exit_code == 0


def test_a_full_disk_exits_6(notes, tmp_path, monkeypatch):
    from mars.data import packed

    monkeypatch.setattr(packed.shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
    result = run("folder", notes, "--out", tmp_path / "out")
    assert result.exit_code == 6
    assert "make room" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nsynth", "nowhere", "--out", "x"], "nowhere"),
        (["folder", "."], "--out"),
        (["folder", ".", "--out", "x", "--seconds", "0"], "--seconds"),
        (["folder", ".", "--out", "x", "--allow-bad", "2"], "--allow-bad"),
        (["nsynth", ".", "--out", "x", "--split", "some"], "--split"),
        (["soundfont", __file__, "--out", "x", "--pitches", "H3"], "such as C4"),
        (["soundfont", __file__, "--out", "x", "--pitches", "70-60"], "--pitches"),
        (["soundfont", __file__, "--out", "x", "--notes", "0"], "--notes"),
    ],
)
def test_usage_errors_name_the_option(arguments, says):
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in result.output


def test_other_errors_exit_2_with_one_line(notes, tmp_path):
    result = run("folder", notes, "--out", notes)
    assert result.exit_code == 2
    assert "exists; name a new folder" in result.output
    result = run("soundfont", __file__, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "Error: " in result.output
    assert len(result.output.splitlines()) == 1
    assert run("info", notes).exit_code == 2
