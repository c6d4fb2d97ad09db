"""Nearest of V codes: the op beside the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mars.kernels import nearest_code
from mars.kernels.nearest_code import reference

IMPLEMENTATIONS = {"op": nearest_code, "reference": reference.nearest_code}


@pytest.mark.benchmark(group="nearest_code")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("codes", [4096, 16384])
def bench_nearest_code(benchmark: Any, threads: int, codes: int, metric: str, implementation: str) -> None:
    x, codebook = torch.randn(1024, 32), torch.randn(codes, 32)
    run: Any = IMPLEMENTATIONS[implementation]
    assert torch.equal(run(x, codebook, metric), reference.nearest_code(x, codebook, metric))
    benchmark.extra_info |= {"flop": 2 * x.numel() * codes, "dtype": "float32"}
    benchmark(run, x, codebook, metric)
