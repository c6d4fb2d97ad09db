"""End to end: seconds for new notes, and for Griffin-Lim alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mars
from mars import audio
from mars.config import preset

NOTES = 8


@pytest.mark.benchmark(group="generate")
def bench_generate(benchmark: Any, threads: int) -> None:
    model = mars.load()
    seconds = NOTES * model.config.audio.samples / model.config.audio.sample_rate
    benchmark.extra_info |= {"notes": NOTES, "seconds of sound": seconds}
    notes = benchmark.pedantic(model.generate, (NOTES,), rounds=3, warmup_rounds=1)
    assert all(torch.isfinite(note.waveform).all() for note in notes)


@pytest.mark.benchmark(group="griffin-lim")
def bench_griffin_lim(benchmark: Any, threads: int) -> None:
    config = preset("notes").audio
    magnitudes = audio.magnitudes(audio.spectrogram(torch.randn(NOTES, config.samples) / 8, config), config)
    benchmark.extra_info |= {"notes": NOTES, "iterations": 32}
    waveforms = benchmark.pedantic(audio.griffin_lim, (magnitudes, config), {"generators": 0}, rounds=3)
    assert torch.isfinite(waveforms).all()
