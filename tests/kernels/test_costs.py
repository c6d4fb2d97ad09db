"""FLOPs of the operations, counted by hand, and workspaces beside what is really allocated."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mars import kernels
from mars.kernels import (
    _backend,
    costs,
    linear_cross_entropy,
    multiscale_quantize,
    nearest_code,
    scale_causal_attention,
)


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_visible_pairs():
    assert costs.visible((1, 4, 9)) == 1 * 1 + 4 * 5 + 9 * 14
    assert costs.visible((7,)) == 49


def test_the_search_is_one_product():
    assert flops(lambda: nearest_code(torch.randn(10, 4), torch.randn(7, 4))) == 2 * 10 * 7 * 4


def test_the_quantiser_is_a_search_and_a_convolution_a_scale():
    scales = ((1, 1), (2, 3))
    f, codebook = torch.randn(5, 4, 2, 3), torch.randn(7, 4)
    weight, bias = torch.randn(2, 4, 4, 3, 3), torch.randn(2, 4)
    found = flops(lambda: multiscale_quantize(f, codebook, weight, bias, [0, 1], scales))
    assert found == 5 * (2 * 7 * (1 + 6) * 4 + 2 * 2 * 6 * 9 * 4 * 4)


def test_a_loss_is_its_logits_and_two_gradients():
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((10, 4), (7, 4), (7,)))
    target = torch.randint(7, (10,))
    actual = flops(lambda: linear_cross_entropy(x, weight, bias, target).backward())
    with kernels.use("reference"):
        expected = flops(lambda: linear_cross_entropy(x, weight, bias, target).backward())
    assert actual == expected == 3 * 2 * 10 * 4 * 7


@pytest.mark.parametrize("backend", ["hybrid", "triton"])
def test_attention_counts_what_is_visible(backend):
    if (why := _backend.missing("triton", "cpu")) and backend == "triton":
        pytest.skip(why)
    q, k, v = (torch.randn(2, 3, 14, 16, requires_grad=True) for _ in range(3))
    visible = 1 + 4 * 5 + 9 * 14
    found = []
    out = None

    def forward():
        nonlocal out
        out = scale_causal_attention(q, k, v, (1, 4, 9), backend=backend)

    found.append(flops(forward))
    found.append(flops(lambda: out.sum().backward()))
    assert found == [2 * 3 * 2 * 2 * visible * 16, 2 * 3 * 5 * 2 * visible * 16]


def test_pytorchs_attention_on_a_cpu_counts_too():
    q, k, v = (torch.randn(2, 3, 14, 16, requires_grad=True) for _ in range(3))
    out = scale_causal_attention(q, k, v, (14,), backend="dense")
    assert flops(lambda: scale_causal_attention(q, k, v, (14,), backend="dense")) == 2 * 3 * 4 * 14 * 14 * 16
    assert flops(lambda: out.sum().backward()) == 2 * 3 * 10 * 14 * 14 * 16


def test_only_what_needs_a_workspace_has_one():
    x = torch.ones(8, 4)
    assert costs.workspace(torch.ops.aten.add.Tensor, (x, x)) == 0
    with _backend.planned("cuda"):
        found = costs.workspace(torch.ops.mars.nearest_code.default, (x, torch.ones(100, 4), "l2"))
        q, rest = torch.ones(2, 3, 5, 16), [None] * 8
        fused = torch.ops.mars.scale_causal_attention_backward.default
        assert costs.workspace(fused, (q, q, *rest)) == 2 * 4 * (2 * 3 * 5)
    assert 2 * 4 * 100 * 4 <= found < 10_000
    packed, large = 8 * 100_000 * 4, torch.ones(1000, 4)
    with kernels.use("reference"):
        found = costs.workspace(torch.ops.mars.nearest_code.default, (large, torch.ones(100_000, 4), "l2"))
    assert found == 2 * 2**26 + packed  # not 2 * 4 * 1000 * 100_000: slices of the scores, and their copy


def test_planned_kernels_are_those_of_the_device():
    def chosen():
        x = torch.empty(2, 3, 169, 16, dtype=torch.bfloat16, requires_grad=True)
        return [type(scale_causal_attention(x, x, x, n).grad_fn).__name__ for n in ((160, 9), (169,))]

    with FakeTensorMode():
        several, single = chosen()
        assert "hybrid_attention" in several
        assert "ScaledDotProductFlashAttentionForCpu" in single
        with _backend.planned("cuda"):
            assert _backend.backend("cuda") == "triton"
            several, single = chosen()
    assert "scale_causal_attention" in several
    assert "ScaledDotProductFlashAttention" in single
