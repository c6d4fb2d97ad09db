"""What TensorBoard gets, read back from its own files."""

from __future__ import annotations

import io
import sys
import wave

import numpy as np
import pytest
import torch

from mars.errors import ConfigError
from mars.runs.samples import Sample
from mars.runs.tensorboard import Board
from mars.train.start import train


def test_without_the_package_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"TensorBoard needs tensorboard; run: pip install tensorboard$"):
        train("tokenizer", preset="smoke", out=tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def read(path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(path / "tensorboard")).Reload()


def test_scalars_sounds_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    tone = torch.sin(torch.arange(800) / 10) / 2
    board = Board(tmp_path, 0)
    board.log({"step": 5, "loss": 0.5, "lr": 1e-3, "time": 1.0, "collapsed": []})
    board.log({"step": 5, "val_mse": 0.25, "perplexity": [1.0, 2.5], "time": 1.0})
    board.log({"step": 7, "loss": None, "time": 1.0})
    board.log({"step": 7, "event": "stopped", "time": 1.0})
    board.show("sample", [Sample("a", tone, torch.zeros(32, 20))], 8000, 5)
    board.close()
    found = read(tmp_path)
    names = {"training/loss", "training/lr", "validation/val_mse", "validation/perplexity/1", "validation/perplexity/2"}
    assert set(found.Tags()["scalars"]) == names
    assert [(e.step, e.value) for e in found.Scalars("training/loss")] == [(5, 0.5)]
    assert [(e.step, e.value) for e in found.Scalars("validation/perplexity/2")] == [(5, 2.5)]
    (sound,) = found.Audio("sample/0")
    with wave.open(io.BytesIO(sound.encoded_audio_string)) as file:
        samples = np.frombuffer(file.readframes(800), "<i2")
        assert file.getframerate() == 8000
    assert np.abs(samples / 32768 - tone.numpy()).max() < 1e-3
    (picture,) = found.Images("sample/0")
    assert (picture.step, picture.width, picture.height) == (5, 20, 32)


def test_steps_that_are_done_again_are_taken_back(tmp_path):
    pytest.importorskip("tensorboard")
    for start, steps, value in ((0, range(1, 9), 1.0), (4, range(5, 7), 2.0)):
        board = Board(tmp_path, start)
        for step in steps:
            board.log({"step": step, "loss": value})
        board.close()
    found = [(e.step, e.value) for e in read(tmp_path).Scalars("training/loss")]
    assert found == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]
