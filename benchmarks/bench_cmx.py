"""Channel multiplexing beside a plain copy of the same bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mars.kernels import cmx, inverse_cmx

FACTORS = [(2, 1), (2, 2), (8, 4)]


@pytest.fixture
def spectrograms(benchmark: Any) -> torch.Tensor:
    x = torch.randn(16, 512, 256)
    benchmark.extra_info |= {"bytes": 2 * x.nbytes, "dtype": "float32"}
    return x


@pytest.mark.benchmark(group="cmx")
def bench_copy(benchmark: Any, spectrograms: torch.Tensor, threads: int) -> None:
    benchmark(spectrograms.clone)


@pytest.mark.benchmark(group="cmx")
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def bench_cmx(benchmark: Any, spectrograms: torch.Tensor, threads: int, factors: tuple[int, int]) -> None:
    assert torch.equal(inverse_cmx(cmx(spectrograms, factors), factors), spectrograms)
    benchmark(cmx, spectrograms, factors)


@pytest.mark.benchmark(group="cmx")
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def bench_inverse_cmx(benchmark: Any, spectrograms: torch.Tensor, threads: int, factors: tuple[int, int]) -> None:
    benchmark(inverse_cmx, cmx(spectrograms, factors), factors)
