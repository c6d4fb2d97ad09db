"""Channel multiplexing, alone and with the spectrogram, beside a copy of the same bytes and PyTorch.

Targets on one CPU thread, for the fused front end: 0.6 of the speed of the copy, 4 times as fast as torch.compile. The
copy writes to memory that is there; the ops allocate what they return.
On a GPU (RTX 5000 Ada, by the roofline): 0.105 ms for 8 x 512 x 1024 complex numbers, of which the memory needs 0.087.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contenders import Contender, Place, race
from mars.kernels import cmx, inverse_cmx, inverse_spectrogram_cmx, spectrogram_cmx, use
from mars.kernels.cmx import reference

FACTORS = [(2, 2), (8, 4)]
NORMALISATION = (10 ** (-52 / 20), 40 / (math.log(10) * 100))  # epsilon and scale of AudioConfig()
# Samples, bins and frames: rows of frames, and what the front end's STFT gives, whose bins are.
CASES = {"frames contiguous": (8, 512, 1024), "front end": (16, 512, 256)}


def shape(benchmark: Any, case: str = "frames contiguous") -> tuple[int, int, int]:
    """Samples, bins, frames."""
    return CASES[case] if benchmark.enabled else (1, 64, 96)


def copy(place: Place, bytes_: float) -> Contender:
    """Reads and writes this many bytes in all."""
    source = torch.ones(int(bytes_) // 2, dtype=torch.uint8, device=place.device)
    target = torch.ones_like(source)
    return Contender(lambda: target.copy_(source), bytes=bytes_)


def by_pytorch(function: Callable[..., Tensor], *args: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with use("reference"):
            return function(*args)

    return run


def close(result: Tensor, ours: Tensor) -> None:
    torch.testing.assert_close(result, ours, rtol=2e-6, atol=1e-6)


def spectrum(benchmark: Any, place: Place, case: str) -> Tensor:
    samples, bins, frames = shape(benchmark, case)
    if case == "frames contiguous":
        return torch.randn(samples, bins, frames, dtype=torch.complex64, device=place.device)
    return torch.randn(samples, frames, bins + 1, dtype=torch.complex64, device=place.device).mT[:, 1:]


def plain(z: Tensor, factors: tuple[int, int], epsilon: float, scale: float) -> Tensor:
    """The formula on real and imaginary parts, (..., 2): Inductor generates no code for complex numbers."""
    x = (scale * torch.log1p(z.square().sum(-1).sqrt() / epsilon) - 1).clamp(max=1)
    return reference.cmx(x, factors)


@pytest.mark.benchmark(group="cmx")
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("op", [cmx, inverse_cmx], ids=["forward", "inverse"])
def bench_cmx(benchmark: Any, place: Place, op: Callable[..., Tensor], factors: tuple[int, int]) -> None:
    x = torch.randn(shape(benchmark), device=place.device)
    x = x if op is cmx else cmx(x, factors)
    contenders = {
        "ours": Contender(lambda: op(x, factors), bytes=2 * x.nbytes),
        "PyTorch": Contender(by_pytorch(op, x, factors), bytes=2 * x.nbytes, check=close),
        "copy": copy(place, 2 * x.nbytes),
    }
    race(benchmark, place, contenders, rounds=15)


@pytest.mark.benchmark(group="spectrogram_cmx")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
def bench_spectrogram_cmx(benchmark: Any, place: Place, case: str, factors: tuple[int, int]) -> None:
    z = spectrum(benchmark, place, case)
    compiled, bytes_ = torch.compile(plain, dynamic=False), 12.0 * z.numel()
    args = z, factors, *NORMALISATION
    contenders = {
        "ours": Contender(lambda: spectrogram_cmx(*args), bytes=bytes_),
        "PyTorch": Contender(by_pytorch(spectrogram_cmx, *args), bytes=bytes_, check=close),
        "torch.compile": Contender(lambda: compiled(torch.view_as_real(z), *args[1:]), bytes=bytes_, check=close),
        "copy": copy(place, bytes_),
    }
    targets = {"rate": 0.6, "torch.compile": 4.0} if place == Place("cpu", 1) else {}
    race(benchmark, place, contenders, rounds=15, targets=targets)


@pytest.mark.benchmark(group="spectrogram_cmx, backward")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def bench_spectrogram_cmx_backward(benchmark: Any, place: Place, case: str, factors: tuple[int, int]) -> None:
    z = spectrum(benchmark, place, case)
    grad = torch.randn_like(spectrogram_cmx(z, factors, *NORMALISATION))
    backward = torch.ops.mars.spectrogram_cmx_backward
    args = grad, z, *factors, *NORMALISATION
    bytes_ = 20.0 * z.numel()

    def alike(result: Tensor, ours: Tensor) -> None:
        torch.testing.assert_close(result, ours, rtol=1e-5, atol=1e-5)

    contenders = {
        "ours": Contender(lambda: backward(*args), bytes=bytes_),
        "PyTorch": Contender(by_pytorch(backward, *args), bytes=bytes_, check=alike),
        "copy": copy(place, bytes_),
    }
    race(benchmark, place, contenders, rounds=7)


@pytest.mark.benchmark(group="inverse_spectrogram_cmx")
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def bench_inverse_spectrogram_cmx(benchmark: Any, place: Place, factors: tuple[int, int]) -> None:
    x = cmx(2 * torch.rand(shape(benchmark), device=place.device) - 1, factors)
    args = x, factors, *NORMALISATION, (1, 0)
    bytes_ = float(x.nbytes + inverse_spectrogram_cmx(*args).nbytes)

    def alike(result: Tensor, ours: Tensor) -> None:
        torch.testing.assert_close(result, ours, rtol=1e-5, atol=0)

    contenders = {
        "ours": Contender(lambda: inverse_spectrogram_cmx(*args), bytes=bytes_),
        "PyTorch": Contender(by_pytorch(inverse_spectrogram_cmx, *args), bytes=bytes_, check=alike),
        "copy": copy(place, bytes_),
    }
    race(benchmark, place, contenders, rounds=15)
