"""End to end: seconds for new notes, and for Griffin-Lim alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mars
from mars import audio
from mars.config import AudioConfig, preset

NOTES = 8


@pytest.mark.benchmark(group="generate")
def bench_generate(benchmark: Any, threads: int) -> None:
    model = mars.load()
    seconds = NOTES * model.config.audio.samples / model.config.audio.sample_rate
    benchmark.extra_info |= {"notes": NOTES, "seconds of sound": seconds}
    notes = benchmark.pedantic(model.generate, (NOTES,), rounds=3, warmup_rounds=1)
    assert all(torch.isfinite(note.waveform).all() for note in notes)


def by_stft(magnitudes: torch.Tensor, config: AudioConfig, iterations: int = 32) -> torch.Tensor:
    """The same algorithm with `torch.stft` and `torch.istft`."""
    window = torch.hann_window(config.n_fft)
    settings: dict[str, Any] = {"n_fft": config.n_fft, "hop_length": config.hop, "window": window}
    turns = torch.rand(magnitudes.shape, generator=torch.Generator().manual_seed(0))
    angles = torch.polar(torch.ones_like(magnitudes), 2 * torch.pi * turns)
    previous = torch.zeros_like(angles)
    for _ in range(iterations):
        signal = torch.istft(magnitudes * angles, **settings)
        rebuilt = torch.stft(signal, **settings, pad_mode="constant", return_complex=True)
        angles = torch.sgn(rebuilt - 0.99 / 1.99 * previous)
        previous = rebuilt
    return torch.istft(magnitudes * angles, **settings)


def ours(magnitudes: torch.Tensor, config: AudioConfig) -> torch.Tensor:
    """`audio.griffin_lim` with a fixed start."""
    return audio.griffin_lim(magnitudes, config, generators=0)


@pytest.mark.benchmark(group="griffin-lim")
@pytest.mark.parametrize("implementation", [ours, by_stft])
def bench_griffin_lim(benchmark: Any, threads: int, implementation: Any) -> None:
    config = preset("notes").audio
    magnitudes = audio.magnitudes(audio.spectrogram(torch.randn(NOTES, config.samples) / 8, config), config)
    benchmark.extra_info |= {"notes": NOTES, "iterations": 32, "dtype": "float32"}
    waveforms = benchmark.pedantic(implementation, (magnitudes, config), rounds=3, warmup_rounds=1)
    assert torch.isfinite(waveforms).all()
