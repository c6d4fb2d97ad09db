from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from mars.cli.data import main
from mars.data import Dataset

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
        (["soundfont", __file__, "--out", "x", "--pitches", "60"], "want LOW-HIGH"),
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
    assert "exists; give --out a new folder" in result.output
    result = run("soundfont", __file__, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "Error: " in result.output
    assert len(result.output.splitlines()) == 1
    assert run("info", notes).exit_code == 2
