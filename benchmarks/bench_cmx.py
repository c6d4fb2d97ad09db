"""Channel multiplexing, alone and with the spectrogram, beside a plain copy of the same bytes and PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mars.kernels import cmx, inverse_cmx, inverse_spectrogram_cmx, spectrogram_cmx, use
from mars.kernels.cmx import reference

FACTORS = [(2, 1), (2, 2), (8, 4)]
NORMALISATION = (10 ** (-52 / 20), 40 / (math.log(10) * 100))  # epsilon and scale of AudioConfig()
SHAPE = (8, 512, 1024)  # samples, bins, frames
LAYOUTS = ["frames", "bins"]  # which of them is contiguous; bins as the front end's STFT has them


def spectrum(layout: str) -> torch.Tensor:
    samples, bins, frames = SHAPE
    if layout == "frames":
        return torch.randn(SHAPE, dtype=torch.complex64)
    return torch.randn(samples, frames, bins + 1, dtype=torch.complex64).mT[:, 1:]


def copy(benchmark: Any, bytes_each_way: int) -> None:
    """What a copy takes that reads and writes these bytes."""
    source = torch.ones(bytes_each_way, dtype=torch.uint8)
    target = torch.ones_like(source)
    benchmark.extra_info |= {"bytes": 2 * bytes_each_way}
    benchmark(target.copy_, source)


@pytest.fixture
def spectrograms(benchmark: Any) -> torch.Tensor:
    x = torch.randn(SHAPE)
    benchmark.extra_info |= {"bytes": 2 * x.nbytes, "dtype": "float32"}
    return x


@pytest.mark.benchmark(group="cmx")
def bench_copy(benchmark: Any, threads: int) -> None:
    copy(benchmark, 4 * math.prod(SHAPE))


@pytest.mark.benchmark(group="cmx")
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def bench_cmx(
    benchmark: Any, spectrograms: torch.Tensor, threads: int, factors: tuple[int, int], implementation: str
) -> None:
    with use(implementation):
        assert torch.equal(cmx(spectrograms, factors), reference.cmx(spectrograms, factors))
        benchmark(cmx, spectrograms, factors)


@pytest.mark.benchmark(group="cmx")
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def bench_inverse_cmx(
    benchmark: Any, spectrograms: torch.Tensor, threads: int, factors: tuple[int, int], implementation: str
) -> None:
    x = cmx(spectrograms, factors)
    with use(implementation):
        assert torch.equal(inverse_cmx(x, factors), spectrograms)
        benchmark(inverse_cmx, x, factors)


@pytest.mark.benchmark(group="spectrogram_cmx")
def bench_spectrogram_copy(benchmark: Any, threads: int) -> None:
    copy(benchmark, 6 * math.prod(SHAPE))  # 8 bytes are read and 4 written for each element


@pytest.mark.benchmark(group="spectrogram_cmx")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("implementation", ["auto", "reference", "compiled"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
def bench_spectrogram_cmx(
    benchmark: Any, threads: int, layout: str, factors: tuple[int, int], implementation: str
) -> None:
    compiled = torch.compile(plain, dynamic=False)

    def on_real_numbers(z: torch.Tensor, *settings: Any) -> torch.Tensor:
        return compiled(torch.view_as_real(z), *settings)

    function = on_real_numbers if implementation == "compiled" else spectrogram_cmx
    z = spectrum(layout)
    with use("auto" if implementation == "compiled" else implementation):
        exact = reference.spectrogram_cmx(z, factors, *NORMALISATION)
        torch.testing.assert_close(function(z, factors, *NORMALISATION), exact, rtol=0, atol=1e-6)
        benchmark.extra_info |= {"bytes": 12 * z.numel(), "dtype": "complex64"}
        benchmark(function, z, factors, *NORMALISATION)


def plain(z: torch.Tensor, factors: tuple[int, int], epsilon: float, scale: float) -> torch.Tensor:
    """The formula on real and imaginary parts, (..., 2): Inductor generates no code for complex numbers."""
    x = (scale * torch.log1p(z.square().sum(-1).sqrt() / epsilon) - 1).clamp(max=1)
    return reference.cmx(x, factors)


@pytest.mark.benchmark(group="spectrogram_cmx backward")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def bench_spectrogram_cmx_backward(
    benchmark: Any, threads: int, layout: str, factors: tuple[int, int], implementation: str
) -> None:
    z = spectrum(layout)
    grad = torch.randn_like(spectrogram_cmx(z, factors, *NORMALISATION))
    backward = torch.ops.mars.spectrogram_cmx_backward
    with use(implementation):
        exact = reference.spectrogram_cmx_backward(grad, z, factors, *NORMALISATION)
        torch.testing.assert_close(backward(grad, z, *factors, *NORMALISATION), exact)
        benchmark.extra_info |= {"bytes": 20 * z.numel(), "dtype": "complex64"}
        benchmark(backward, grad, z, *factors, *NORMALISATION)


@pytest.mark.benchmark(group="inverse_spectrogram_cmx")
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def bench_inverse_spectrogram_cmx(benchmark: Any, threads: int, factors: tuple[int, int], implementation: str) -> None:
    x = cmx(2 * torch.rand(SHAPE) - 1, factors)
    with use(implementation):
        exact = reference.inverse_spectrogram_cmx(x, factors, *NORMALISATION, (1, 0))
        got = inverse_spectrogram_cmx(x, factors, *NORMALISATION, (1, 0))
        torch.testing.assert_close(got, exact, rtol=2e-6, atol=0)
        benchmark.extra_info |= {"bytes": x.nbytes + exact.nbytes, "dtype": "float32"}
        benchmark(inverse_spectrogram_cmx, x, factors, *NORMALISATION, (1, 0))
