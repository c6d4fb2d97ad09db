"""The loss of the VAR's head, forward and backward, beside the cross-entropy of all logits at once.

Targets on one thread of a CPU: no slower than `F.cross_entropy`, in half its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import Contender, Place, race, sized
from mars.kernels import linear_cross_entropy

WIDTH, CODES = 256, 16_384


def whole(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """The definition: all logits at once."""
    return F.cross_entropy(F.linear(x, weight, bias).float(), target)


@pytest.mark.benchmark(group="linear_cross_entropy forward and backward")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_linear_cross_entropy(benchmark: Any, place: Place, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = sized(benchmark, 1360 if place.device == "cpu" else 21_760)
    x = torch.randn(rows, WIDTH, generator=generator).to(place.device).requires_grad_()
    weight = (torch.randn(CODES, WIDTH, generator=generator) / WIDTH**0.5).to(place.device).requires_grad_()
    bias = torch.zeros(CODES, device=place.device, requires_grad=True)
    target = torch.randint(CODES, (rows,), generator=generator).to(place.device)

    def step(function: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            with torch.autocast(place.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = function(x, weight, bias, target)
            return [loss.detach(), *torch.autograd.grad(loss, (x, weight, bias))]

        return run

    def close(results: list[Tensor], ours: list[Tensor]) -> None:
        for a, b in zip(results, ours, strict=True):
            assert (a - b).norm() <= (0.02 if dtype == torch.bfloat16 else 1e-4) * a.norm()

    contenders = {
        "ours": Contender(step(linear_cross_entropy), flop=6.0 * rows * WIDTH * CODES),
        "all logits": Contender(step(whole), flop=6.0 * rows * WIDTH * CODES, check=close),
    }
    benchmark.extra_info |= {"dtype": str(dtype)}
    targets = {"all logits": 1.0, "memory": 0.5} if place == Place("cpu", 1) else {}
    race(benchmark, place, contenders, targets=targets, memory=True)
