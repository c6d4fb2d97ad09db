"""A few seconds' worth of notes and settings to train on."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from mars.config import Config, preset
from mars.data import Dataset

SMALL = (
    *("audio.n_fft=128", "audio.hop=64", "audio.bins=64", "audio.frames=32", "audio.samples=1900", "audio.cmx=2,1"),
    *("tokenizer.patch=8,8", "tokenizer.width=16", "tokenizer.codebook_size=32", "tokenizer.code_dim=4"),
    *("tokenizer.quantizer_dropout=0.5", "tokenizer.drop_path=0.2", "tokenizer.depth=2"),
    *("var.width=16", "var.drop_path=0.2"),
)


@pytest.fixture(scope="session")
def smoke() -> Config:
    """The smoke preset, smaller still, with all its randomness on."""
    return preset("smoke", SMALL)


@pytest.fixture(scope="session")
def notes() -> Dataset:
    """Eleven short notes in memory; the last three are held out."""
    rng = np.random.default_rng(0)
    t = np.arange(1900) / 16_000
    tones = [np.sin(2 * np.pi * 200 * (i + 1) * t) * np.exp(-9 * t) for i in range(11)]
    audio = (np.stack(tones) * 20_000 + rng.normal(0, 50, (11, 1900))).astype("<i2")
    metadata = np.zeros((11, 6), np.int32)
    metadata[:, 0] = metadata[:, 1] = np.arange(11)  # instrument, family
    metadata[:, 2] = [0, 1, 2, -1, 0, 1, 2, 0, 1, 2, 0]
    metadata[:, 3] = 40 + np.arange(11)
    metadata[:, 4] = 100
    metadata[8:, 5] = 1
    return Dataset(
        audio,
        metadata,
        [f"n{i}" for i in range(11)],
        [f"i{i}" for i in range(11)],
        16_000,
        "0" * 64,
        {"source": "test"},
    )


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """Lets seconds pass on `time.monotonic`, which otherwise stands still, and gives what it shows then."""
    now = 100.0

    def wait(seconds: float = 0.0) -> float:
        nonlocal now
        now += seconds
        return now

    monkeypatch.setattr(time, "monotonic", wait)
    return wait
