"""The front ends against librosa, and what they look at."""

from __future__ import annotations

import dataclasses

import librosa
import numpy as np
import pytest
import torch

from mars.evaluate.embedders.frontend import PUBLISHED, WHOLE_NOTE


def test_the_published_front_end_is_what_its_description_says():
    note = torch.randn(64_000).mul(0.1)
    x = note[:16_383].numpy().astype(np.float64)
    faded = int(0.3 * len(x))
    curve = (np.logspace(1, 0, faded) - 1) / 9
    x[-faded:] *= curve
    spectrum = librosa.stft(x, n_fft=2048, win_length=1024, hop_length=256, pad_mode="reflect")
    picture = np.log(np.abs(spectrum[1:]) + 1e-10)
    assert picture.shape == (1024, 64)
    rows, columns = np.arange(299) * 1024 // 299, np.arange(299) * 64 // 299
    seen = PUBLISHED(note[None])
    assert seen.shape == (1, 1, 299, 299)
    np.testing.assert_allclose(seen[0, 0].numpy(), picture[np.ix_(rows, columns)], atol=1e-4)


def test_the_published_front_end_is_exact_where_a_tone_leaves_its_bins_quiet():
    """librosa computes in float64; in float32 a quarter of the bins of a 16-bit tone would be rounding noise."""
    time = np.arange(16_383) / 16_000
    tone = np.round(16_384 * np.sin(2 * np.pi * 440 * time)) / 32_768
    x = tone.copy()
    x[-4914:] *= (np.logspace(1, 0, 4914) - 1) / 9
    spectrum = librosa.stft(x, n_fft=2048, win_length=1024, hop_length=256, pad_mode="reflect", dtype=np.complex128)
    expected = np.log(np.abs(spectrum[1:]) + 1e-10)
    seen = dataclasses.replace(PUBLISHED, square=0)(torch.from_numpy(tone)[None].float())
    np.testing.assert_allclose(seen[0, 0].numpy(), expected, atol=1e-4)


def test_the_whole_note_front_end_is_librosas_log_mel():
    note = torch.randn(64_000).mul(0.1)
    padded = np.pad(note.numpy(), (0, 65_280 - 64_000))
    mels = librosa.feature.melspectrogram(
        y=padded, sr=16_000, n_fft=2048, hop_length=256, n_mels=128, fmin=20, fmax=8000, power=1.0
    )
    expected = np.clip((20 * np.log10(np.maximum(mels, 1e-10)) + 80) / 100, 0, 1)
    seen = WHOLE_NOTE(note[None])
    assert seen.shape == (1, 1, 128, 256)
    np.testing.assert_allclose(seen[0, 0].numpy(), expected, atol=1e-4)


def test_the_published_front_end_looks_at_the_first_second_alone():
    note = torch.randn(2, 64_000)
    note[1, :16_383] = note[0, :16_383]
    first, second = PUBLISHED(note)
    assert torch.equal(first, second)


@pytest.mark.parametrize("front_end", [PUBLISHED, WHOLE_NOTE], ids=["published", "whole"])
def test_short_notes_are_padded_with_silence(front_end):
    note = torch.randn(1, 9_000)
    padded = torch.nn.functional.pad(note, (0, 70_000))
    assert torch.equal(front_end(note), front_end(padded))


def test_silence_is_the_lowest_value():
    assert torch.equal(WHOLE_NOTE(torch.zeros(1, 64_000)), torch.zeros(1, 1, 128, 256))
    assert PUBLISHED(torch.zeros(1, 64_000)).unique().item() == pytest.approx(np.log(1e-10))


def test_every_setting_is_in_the_hash():
    others = {"samples": 2000, "fade": 0.5, "n_fft": 4096, "window": 32, "hop": 8, "padding": "reflect", "mels": 3}
    others |= {"scale": "ln", "square": 7}
    assert others.keys() == {f.name for f in dataclasses.fields(WHOLE_NOTE)}
    hashes = {dataclasses.replace(WHOLE_NOTE, **{name: value}).hash for name, value in others.items()}
    assert len(hashes | {WHOLE_NOTE.hash}) == len(others) + 1
