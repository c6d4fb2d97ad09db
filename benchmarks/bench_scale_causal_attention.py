"""Block-causal attention, forward and backward: the op beside the dense-mask definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mars.kernels import scale_causal_attention
from mars.kernels.scale_causal_attention import reference

IMPLEMENTATIONS = {"op": scale_causal_attention, "reference": reference.scale_causal_attention}
LENGTHS = [n * n for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]


@pytest.mark.benchmark(group="scale_causal_attention forward and backward")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_attention(benchmark: Any, threads: int, dtype: torch.dtype, implementation: str) -> None:
    q, k, v = (torch.randn(1, 4, sum(LENGTHS), 64, dtype=dtype, requires_grad=True) for _ in range(3))
    run: Any = IMPLEMENTATIONS[implementation]

    def step() -> torch.Tensor:
        y = run(q, k, v, LENGTHS, 0.125)
        y.sum().backward()
        return y

    benchmark.extra_info |= {"dtype": str(dtype)}
    assert torch.isfinite(benchmark(step)).all()
