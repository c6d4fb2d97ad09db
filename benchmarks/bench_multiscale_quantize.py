"""The whole coarse-to-fine quantiser beside plain PyTorch, at the sizes of two presets.

Targets on a CPU, one thread: 15 times as fast as PyTorch at the paper's size (32 maps, 21,760 tokens of 16,384 codes)
with the same tokens, and twice as fast in the gradient.
On a GPU (RTX 5000 Ada, by the roofline): 0.25 ms for those 32 maps, of which the search's products need 0.09.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contenders import Contender, Place, race, sized
from mars import kernels
from mars.config import preset
from mars.kernels import multiscale_quantize
from mars.kernels.multiscale_quantize import reference
from mars.kernels.multiscale_quantize.problem import Problem
from mars.models.quantizer import Quantizer


def arguments(name: str, rows: int, device: str) -> tuple[Any, ...]:
    """A preset's quantiser as it starts, and maps of the size of its codes."""
    quantizer = Quantizer(preset(name).tokenizer).to(device)
    codes = torch.randn_like(quantizer.codebook)
    f = torch.randn(max(rows // quantizer.starts[-1], 1), quantizer.config.code_dim, *quantizer.scales[-1])
    phis = quantizer.phi_weight.detach(), quantizer.phi_bias.detach()
    return f.to(device), codes, *phis, quantizer.phi_index, quantizer.scales


def agreeing(ids: Tensor, wanted: Tensor) -> Tensor:
    """The maps of equal tokens: scores within rounding of each other may change places, and then all that follows of
    a map does. There must be few others."""
    agree = (ids == wanted).all(dim=1)
    assert agree.any()
    assert agree.sum() >= 0.95 * len(agree) - 1
    return agree


def same(found: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor]) -> None:
    (ids, totals), (expected, sums) = found, ours
    agree = agreeing(ids, expected)
    torch.testing.assert_close(totals[:, agree], sums[:, agree], rtol=1e-4, atol=1e-4)


@pytest.mark.benchmark(group="multiscale_quantize")
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("name", ["notes", "paper"])
def bench_quantize(benchmark: Any, place: Place, name: str, metric: Any) -> None:
    args = arguments(name, sized(benchmark, 32 * 680), place.device)

    def run(backend: str) -> Callable[[], Any]:
        def quantize() -> tuple[Tensor, Tensor]:
            with kernels.use(backend):
                return multiscale_quantize(*args, metric=metric)

        return quantize

    ids, expected = run("auto")()[0], run("reference")()[0]
    benchmark.extra_info |= {"tokens": ids.numel(), "tokens that differ": int((ids != expected).sum())}
    (batch, dim, *_), tokens = args[0].shape, sum(h * w for h, w in args[-1])
    flop = 2.0 * batch * (tokens * dim * len(args[1]) + tokens * 9 * dim**2)
    contenders = {
        "ours": Contender(run("auto"), flop=flop),
        "PyTorch": Contender(run("reference"), check=same),
    }
    targets = {"PyTorch": 15.0} if name == "paper" and place.device == "cpu" and place.threads == 1 else {}
    race(benchmark, place, contenders, rounds=3, targets=targets)


@pytest.mark.benchmark(group="multiscale_quantize, gradient of the sums")
@pytest.mark.parametrize("name", ["notes", "paper"])
def bench_gradient(benchmark: Any, place: Place, name: str) -> None:
    f, *weights, phi_index, scales = arguments(name, sized(benchmark, 32 * 680), place.device)
    weights = [w.requires_grad_() for w in weights]
    ids, ours = multiscale_quantize(f, *weights, phi_index, scales)
    expected, plain = reference.multiscale_quantize(Problem(f, *weights, phi_index, scales, "l2", 0.5, None))
    factors = torch.randn_like(ours) * agreeing(ids, expected)[:, None, None, None]  # the others' gradients are 0

    def run(totals: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(totals, weights, factors, retain_graph=True)

    def close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())

    contenders = {"ours": Contender(run(ours)), "PyTorch's autograd": Contender(run(plain), check=close)}
    targets = {"PyTorch's autograd": 2.0} if place.device == "cpu" and place.threads == 1 else {}
    race(benchmark, place, contenders, rounds=5, targets=targets)
