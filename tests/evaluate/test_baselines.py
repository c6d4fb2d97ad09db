"""Baselines: what the filter lets through, 8 bit, phases that are a note's own, disjoint halves, keys for the cache."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from mars import audio
from mars.audio import within_full_scale
from mars.config import AudioConfig, preset
from mars.errors import ConfigError, DataError
from mars.evaluate.baselines import anchor, griffin_lim_oracle, halves, low_pass, quantise
from mars.evaluate.mel import log_mel
from mars.evaluate.sets import SAMPLES, NoteSet, open_notes

FRONT_END = preset("smoke").audio


@pytest.fixture(scope="module")
def notes() -> NoteSet:
    return open_notes(None, split="test").subset([0, 5, 9])


def tone(hertz: float) -> torch.Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(16_000, dtype=torch.float64) / 16_000)[None]


@pytest.mark.parametrize("hertz", [100, 500, 1000, 2000, 3999])
def test_the_filter_is_butterworths_of_order_4(hertz):
    """|H|^2 = 1 / (1 + (f / fc)^8), with the frequencies that the bilinear transform makes of f and fc."""
    warped = math.tan(math.pi * hertz / 16_000) / math.tan(math.pi * 1000 / 16_000)
    level = low_pass(tone(hertz))[0, 8000:].square().mean() * 2
    assert level.item() == pytest.approx(1 / (1 + warped**8), rel=1e-3)


def test_the_filter_is_scipys():
    signal = pytest.importorskip("scipy.signal")
    x = torch.rand(2, 5000, dtype=torch.float64) - 0.5
    expected = signal.lfilter(*signal.butter(4, 1000, fs=16_000), x.numpy())
    torch.testing.assert_close(low_pass(x), torch.from_numpy(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [2, 255, 256, 257, 1000])
def test_the_end_of_a_note_does_not_come_back_at_its_start(samples):
    x = torch.zeros(1, samples, dtype=torch.float64)
    x[0, -1] = 1
    assert low_pass(x)[0, :-1].abs().max() < 1e-15


def test_8_bit_are_256_steps():
    x = torch.linspace(-1, 1, 100_001)
    steps = quantise(x)
    assert torch.equal(steps.unique(), torch.arange(-128, 128) / 128)
    inside = x < 127 / 128
    assert (steps - x)[inside].abs().max() <= 1 / 256 + 1e-7
    assert torch.equal(quantise(steps), steps)


def test_the_anchor_is_dull_and_coarse(notes):
    worse = anchor(notes)
    x = worse.waveforms()
    assert x.shape == (3, SAMPLES)
    assert x.dtype == torch.float32
    assert torch.equal(x, quantise(low_pass(notes.waveforms())))
    bands = [
        torch.fft.rfft(each).abs()[:, 8000:].square().sum() for each in (notes.waveforms(), low_pass(notes.waveforms()))
    ]
    assert bands[1] < 0.01 * bands[0]  # above 2 kHz


def test_a_baseline_keeps_what_is_known_and_has_keys_of_its_own(notes):
    worse, oracle = anchor(notes), griffin_lim_oracle(notes, FRONT_END, 0)
    for derived in (worse, oracle):
        assert derived.names == notes.names
        assert derived.ids == notes.ids
        assert np.array_equal(derived.pitch, notes.pitch)
        assert derived.labels == notes.labels
        assert derived.source.startswith(notes.source + ", ")
    others = [griffin_lim_oracle(notes, FRONT_END, 1), griffin_lim_oracle(notes, FRONT_END, 0, seed=1)]
    others.append(griffin_lim_oracle(notes, AudioConfig(min_db=-60), 0))
    keys = [key for each in (notes, worse, oracle, *others) for key in each.keys]
    assert len(set(keys)) == len(keys)
    assert anchor(notes).keys == worse.keys


def test_the_oracle_is_griffin_lim_on_the_true_magnitudes(notes):
    one = notes.subset([1])
    restored = griffin_lim_oracle(one, FRONT_END, 16).waveforms()
    assert restored.shape == (1, SAMPLES)
    assert 0 < restored.abs().max() <= 1
    near, far = (torch.mean(torch.abs(log_mel(one.waveforms()) - log_mel(x))) for x in (restored, notes.waveforms([0])))
    assert near < 0.25 * far
    started = griffin_lim_oracle(one, FRONT_END, 0).waveforms()
    assert torch.mean(torch.abs(log_mel(one.waveforms()) - log_mel(started))) > 2 * near


def test_the_oracles_phases_are_the_notes_own(notes):
    """Whatever stands beside a note, and wherever it stands: bit for bit."""
    oracle = griffin_lim_oracle(notes, FRONT_END, 1)
    together = oracle.waveforms()
    assert torch.equal(oracle.waveforms([2, 0]), together[[2, 0]])
    turned = griffin_lim_oracle(notes.subset([2, 1, 0]), FRONT_END, 1)
    assert torch.equal(turned.waveforms(), together[[2, 1, 0]])
    assert torch.equal(turned.subset([1]).waveforms(), together[[1]])
    assert not torch.equal(griffin_lim_oracle(notes, FRONT_END, 1, seed=1).waveforms([0]), together[[0]])


def test_the_oracle_of_a_model_with_shorter_notes_is_padded(notes):
    short = AudioConfig(samples=8000, frames=33, bins=512)
    restored = griffin_lim_oracle(notes, short, 1).waveforms([0])
    assert restored.shape == (1, SAMPLES)
    assert torch.count_nonzero(restored[:, 8000:]) == 0
    assert torch.count_nonzero(restored[:, :8000]) > 7000


def test_the_oracle_of_a_model_at_another_rate_is_an_error(notes):
    with pytest.raises(ConfigError, match=r"at 16000 Hz, the model's are at 8000 Hz"):
        griffin_lim_oracle(notes, AudioConfig(sample_rate=8000))


def test_the_oracle_is_made_quieter_not_clipped(notes, monkeypatch):
    loud = torch.linspace(-3, 2, SAMPLES).expand(1, -1)
    monkeypatch.setattr(audio, "griffin_lim", lambda *_, **__: loud)
    torch.testing.assert_close(griffin_lim_oracle(notes, FRONT_END).waveforms([0]), loud / 3)
    quiet = torch.tensor([[0.5, -0.25], [1.0, 0.0]])
    assert torch.equal(within_full_scale(quiet), quiet)


@pytest.mark.parametrize("count", [2, 3, 10, 25])
def test_halves_are_disjoint_and_do_not_depend_on_the_order(count):
    notes = open_notes(None, split="test").subset(range(count))
    ours = halves(notes, 3)
    assert [len(half) for half in ours] == [count // 2] * 2
    assert not set(ours[0].keys) & set(ours[1].keys)
    assert set(ours[0].keys) | set(ours[1].keys) <= set(notes.keys)
    turned = halves(notes.subset(range(count)[::-1]), 3)
    assert [half.keys for half in turned] == [half.keys for half in ours]
    assert torch.equal(ours[1].waveforms(), notes.waveforms([notes.keys.index(key) for key in ours[1].keys]))


def test_halves_follow_the_seed():
    notes = open_notes(None, split="test")
    found = {frozenset(halves(notes, seed)[0].keys) for seed in range(5)}
    assert len(found) == 5


def test_one_note_has_no_halves(notes):
    with pytest.raises(DataError, match=re.escape("want at least two notes to make two halves of, got 1")):
        halves(notes.subset([0]), 0)
