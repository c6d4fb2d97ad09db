"""End to end: seconds for new notes, and for Griffin-Lim alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mars
from benchmarks.contenders import Contender, Place, race
from mars import audio, kernels
from mars.config import AudioConfig, preset

NOTES = 8


@pytest.mark.benchmark(group="generate, 8 notes of the packaged model")
def bench_generate(benchmark: Any, place: Place) -> None:
    model = mars.load(device=place.device)

    def run(backend: str) -> Callable[[], Any]:
        def notes() -> Any:
            with kernels.use(backend):
                return model.generate(NOTES if benchmark.enabled else 1)

        return notes

    def same(notes: Any, ours: Any) -> None:
        """But for one, in which a draw may fall within rounding of two tokens' border."""
        agree = sum(torch.equal(a.ids, b.ids) for a, b in zip(notes, ours, strict=True))
        assert agree >= max(len(ours) - 1, 1)

    contenders = {"ours": Contender(run("auto")), "plain PyTorch kernels": Contender(run("reference"), check=same)}
    race(benchmark, place, contenders, rounds=3, wall=True)


def by_stft(magnitudes: torch.Tensor, config: AudioConfig, iterations: int = 32) -> torch.Tensor:
    """The same algorithm with `torch.stft` and `torch.istft`."""
    window = torch.hann_window(config.n_fft, device=magnitudes.device)
    settings: dict[str, Any] = {"n_fft": config.n_fft, "hop_length": config.hop, "window": window}
    turns = torch.rand(magnitudes.shape, generator=torch.Generator().manual_seed(0)).to(magnitudes.device)
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


@pytest.mark.benchmark(group="Griffin-Lim, 8 notes, 32 iterations")
def bench_griffin_lim(benchmark: Any, place: Place) -> None:
    config = preset("notes").audio
    notes = torch.randn(NOTES if benchmark.enabled else 1, config.samples) / 8
    magnitudes = audio.magnitudes(audio.spectrogram(notes, config), config).to(place.device)
    contenders = {
        "ours": Contender(lambda: ours(magnitudes, config)),
        "torch.stft and torch.istft": Contender(lambda: by_stft(magnitudes, config)),
    }
    assert all(torch.isfinite(c.run()).all() for c in contenders.values())
    race(benchmark, place, contenders, rounds=3, wall=True)
