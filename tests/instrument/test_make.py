"""An instrument of the packaged model: its files, its arithmetic, and how it sounds in a player."""

from __future__ import annotations

import json
import re
import wave

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import mars
from mars.cli.instrument import main
from mars.errors import ConfigError, DataError
from mars.instrument.make import judged, keys_of, make, neighbours, velocities_of
from mars.instrument.pitch import measured
from mars.notes import Note

HORN = {"family": "brass", "source": "acoustic"}


@pytest.fixture(scope="module")
def model():
    return mars.load()


@pytest.fixture(scope="module")
def horn(tmp_path_factory):
    """Two notes of a horn, made by the command."""
    out = tmp_path_factory.mktemp("instruments") / "horn"
    words = (out, "--family", "brass", "--pitch", "A3-C4", "--velocity", "100", "--tries", 3, "--device", "cpu")
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return out, done.output


def regions(out):
    lines = (out / f"{out.name}.sfz").read_text().splitlines()
    return [dict(re.findall(r"(\w+)=(\S+)", line)) for line in lines if line.startswith("<region>")]


def test_files_and_what_is_said(horn):
    out, said = horn
    assert sorted(p.name for p in out.iterdir()) == ["horn.sfz", "index.html", "instrument.json", "pictures", "samples"]
    assert "brass, acoustic: 2 notes from A3 to C4, 1 velocities, 3 tries each" in said
    assert "2 notes in" in said
    assert str(out / "horn.sfz") in said
    document = json.loads((out / "instrument.json").read_text())
    assert document["condition"] == HORN
    assert document["left_out"] == []
    assert [region["key"] for region in document["regions"]] == [57, 60]
    page = (out / "index.html").read_text()
    assert 'src="samples/057-v100.wav"' in page
    assert (out / "pictures/060-v100.png").is_file()


def test_the_arithmetic_holds_without_a_player(horn):
    out, _ = horn
    found = regions(out)
    assert [(r["lokey"], r["hikey"], r["lovel"], r["hivel"]) for r in found] == [
        ("56", "58", "1", "127"), ("59", "61", "1", "127"),
    ]  # fmt: skip
    for region in found:
        with wave.open(str(out / region["sample"])) as file:
            rate, count = file.getframerate(), file.getnframes()
            samples = np.frombuffer(file.readframes(count), "<i2") / 32768
        pitch = measured(samples, rate)
        assert pitch + int(region["tune"]) / 100 == pytest.approx(int(region["pitch_keycenter"]), abs=0.1)
        assert float(region["volume"]) <= 0
        if region["loop_mode"] == "loop_continuous":
            assert 0 < int(region["loop_start"]) < int(region["loop_end"]) < count


def test_a_scale_in_a_player_has_its_pitches(horn):
    pysfizz = pytest.importorskip("pysfizz", reason="pysfizz, the player, is not installed")
    player = pysfizz.Synth(48_000, 512)
    assert player.load_sfz_file(horn[0] / "horn.sfz")
    assert player.playable_keys == list(range(56, 62))
    for key in (56, 58, 59, 61):
        sound = np.asarray(player.render_note(key, 100, 2.0, 2.5))
        mono = sound.mean(0 if sound.shape[0] == 2 else -1) if sound.ndim == 2 else sound
        assert measured(mono, 48_000) == pytest.approx(key, abs=0.1)


def test_a_folder_that_is_there_is_left_alone(horn):
    before = {p: p.stat().st_mtime_ns for p in horn[0].rglob("*")}
    done = CliRunner().invoke(main, [str(horn[0]), "--family", "brass"])
    assert done.exit_code == 2
    assert "is there; name a new folder" in done.output
    assert {p: p.stat().st_mtime_ns for p in horn[0].rglob("*")} == before


def test_keys_and_velocities_are_those_trained_on(model):
    keys = keys_of(model, HORN, None, 3)
    usual = [entry["pitch"] for entry in model.notes if (entry["family"], entry["source"]) == ("brass", "acoustic")]
    assert keys == list(range(keys[0], keys[-1] + 1, 3))
    assert usual[0][0] <= keys[0] < usual[0][0] + 3
    assert usual[0][1] - 3 < keys[-1] <= usual[0][1]
    assert keys_of(model, HORN, (60, 62), 5) == [61]
    assert velocities_of(model, HORN) == [25, 75, 127]


def test_what_cannot_be_an_instrument_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="pitch 120: the notes"):
        make(model, tmp_path / "a", "a", HORN, [120], [100])
    noise = 0.1 * torch.randn(64_000, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="no steady pitch"):
        make(model, tmp_path / "a", "a", HORN, [60], [100], like=noise)
    assert not (tmp_path / "a").exists()
    done = CliRunner().invoke(main, [str(tmp_path / "a"), "--velocity", "0,200"])
    assert done.exit_code == 2
    assert "want velocities from 1 to 127" in done.output


def test_a_note_of_another_pitch_is_no_candidate():
    tone = 0.3 * torch.sin(2 * torch.pi * 440 * torch.arange(48_000) / 16_000).float()

    def note(pitch, waveform=tone):
        return Note(0, waveform, torch.zeros(1), torch.zeros(1), {"pitch": pitch}, 16_000)

    found = judged(note(69))
    assert found.octaves == 0
    assert abs(found.cents) < 1
    assert judged(note(81)).octaves == -1
    assert judged(note(70)) is None
    assert judged(note(69, tone * 0)) is None
    assert neighbours({(69, 100): found}) == 0
