"""A folder of sounds becomes a model: with one of random weights to start from, which is quick."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

from mars import config, load
from mars.cli.train import main
from mars.data import Dataset
from mars.model import Model
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR
from mars.runs.log import read_log
from mars.train import finetune as module
from tests.train.conftest import SMALL

RATE = 16_000


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "STEPS", 4)
    monkeypatch.setattr(
        module,
        "SETTINGS",
        {name: {"lr": 3e-3, "validate_every": 2, "patience": 5} for name in ("tokenizer", "var")},
    )


@pytest.fixture
def base(tmp_path):
    """A model of random weights that knows families, sources, pitches and velocities."""
    settings = config.preset("smoke", (*SMALL, "tokenizer.scales=[1,2]", "var.width=16", "var.depth=1"))
    torch.manual_seed(0)
    made = Model(config=settings, tokenizer=Tokenizer(settings), var=VAR(settings.var, settings.tokenizer))
    made.save(tmp_path / "base")
    return tmp_path / "base"


def sounds(folder: Path, count: int = 8, kind: str = "tone") -> Path:
    """Two instruments of tones, a semitone apart."""
    for i in range(count):
        path = folder / ("high" if i % 2 else "low") / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        hertz = 440 * 2 ** ((50 + i + 12 * (i % 2) - 69) / 12)
        sound = 0.5 * np.sin(2 * np.pi * hertz * np.arange(RATE // 4) / RATE)
        soundfile.write(path, {"tone": sound, "silent": 0 * sound, "same": np.ones(4000) / 2}[kind], RATE)
    return folder


def run(*words: object):
    return CliRunner().invoke(main, ["finetune", *map(str, words)])


def test_a_folder_becomes_a_model_and_a_page(base, tmp_path):
    result = run(sounds(tmp_path / "my sounds"), "--from", base, "--out", "own", "--notes", 3, "--threads", 1)
    assert result.exit_code == 0, result.output
    made, found = load("own"), json.loads(Path("own/result.json").read_text())
    assert made.config.var.condition == ("family", "source", "pitch", "velocity", "instrument")
    assert made.words == {"instrument": ["high", "low"]}
    assert {entry["instrument"] for entry in made.notes} == {"high", "low"}
    assert made.data == dict.fromkeys(("tokenizer", "var"), Dataset.open("own/data").fingerprint)
    for stage in ("tokenizer", "var"):
        assert read_log(Path("own", stage)).state() == "finished"
        learned = found[stage]
        assert learned["best"] <= learned["start"]
        assert (learned["steps"], learned["best_step"]) <= (4, 4)
    assert found["new_notes"]["notes"] == 3
    page = Path("own/notes/index.html").read_text()
    assert "<audio" in page
    assert len(list(Path("own/notes").glob("*.wav"))) >= 3
    assert (
        result.output.rstrip("\n").splitlines()[-1]
        == f"next: {shlex.join(['mars-generate', '-n', '64', '--model', 'own'])}"
    )
    (note,) = made.generate(1, instrument="low")
    assert note.condition["instrument"] == "low"


def test_the_same_call_goes_on_and_another_is_refused(base, tmp_path, monkeypatch):
    words = (sounds(tmp_path / "sounds"), "--from", base, "--out", "own", "--notes", 2, "--threads", 1)
    train = module.train

    def interrupted(stage, **options):
        if stage == "var":
            raise KeyboardInterrupt
        return train(stage, **options)

    monkeypatch.setattr(module, "train", interrupted)
    assert run(*words).exit_code == 130
    assert not Path("own/model").exists()
    monkeypatch.setattr(module, "train", train)
    steps = len(read_log(Path("own/tokenizer")).records)
    assert run(*words).exit_code == 0
    records = read_log(Path("own/tokenizer")).records
    assert [r for r in records[steps:] if "event" not in r] == []  # it was whole
    first = Path("own/result.json").read_text()
    again = run(*words)
    assert again.exit_code == 0, again.output
    assert Path("own/result.json").read_text() == first
    other = run(*words, "--seed", 1)
    assert other.exit_code == 2
    assert "was begun with seed 0, not 1" in other.output


@pytest.mark.parametrize(
    ("count", "kind", "says", "code"),
    [(1, "tone", "want at least 4 different sounds, got 1", 2), (3, "tone", "different sounds, got 3", 2),
     (8, "same", "got 8, 1 of them different", 2), (8, "silent", "8 of 8 files are bad", 3)],
)  # fmt: skip
def test_too_few_sounds_are_told(count, kind, says, code, base, tmp_path):
    result = run(sounds(tmp_path / "sounds", count, kind), "--from", base, "--out", "own")
    assert result.exit_code == code, result.output
    assert says in result.output
    assert result.output.rstrip("\n").splitlines()[-1].startswith("Error: ")


def test_too_short_a_time_is_told(base, tmp_path):
    result = run(sounds(tmp_path / "sounds"), "--from", base, "--out", "own", "--time", "2s")
    assert result.exit_code == 2
    assert "no time for one validation on held-out sounds; give --time more than 2 s" in result.output


def test_a_model_of_another_rate_or_of_one_stage_is_refused(base, tmp_path):
    from mars.data.folder import pack_folder

    pack_folder(sounds(tmp_path / "sounds"), "fast", sample_rate=22_050, seconds=0.25)
    result = run("fast", "--from", base, "--out", "own")
    assert result.exit_code == 2
    assert "is at 22,050 Hz, the model to start from at 16,000 Hz" in result.output
    (base / "var.safetensors").unlink()
    manifest = json.loads((base / "manifest.json").read_text())
    del manifest["files"]["var.safetensors"]
    (base / "manifest.json").write_text(json.dumps(manifest))
    result = run("fast", "--from", base, "--out", "other")
    assert result.exit_code == 2
    assert "is a tokenizer only" in result.output
    Path("full").mkdir()
    Path("full/letter").write_text("dear")
    assert "holds something else" in run("fast", "--out", "full").output
