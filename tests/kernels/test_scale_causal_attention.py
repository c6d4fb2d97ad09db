"""Block-causal attention: at most twice as far from float64 as plain PyTorch in the same dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mars.kernels import attention, scale_causal_attention
from mars.kernels.scale_causal_attention import op

SCHEDULES = [
    (1,),
    (7,),
    (1, 4, 9),
    (2, 6, 15, 33, 63),  # one group and one scale of its own
    (95, 1, 1),  # the group ends inside the schedule
    (97, 3),  # no group at all
    (100,),
    (1, 4, 9, 16, 25, 36, 64),
]
DTYPES = [torch.float32, torch.bfloat16]


def inputs(lengths, dtype=torch.float32, d=16, batch=2, heads=3):
    return [torch.randn(batch, heads, sum(lengths), d).to(dtype) for _ in range(3)]


def dense(q, k, v, lengths, scale):
    """Mask written out entry by entry."""
    scale_of = [i for i, n in enumerate(lengths) for _ in range(n)]
    hidden = torch.tensor([[a < b for b in scale_of] for a in scale_of])
    return ((q @ k.mT) * scale).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def assert_as_accurate(found, eager, exact, slack=2.0):
    """The RMS error is at most `slack` times eager's, or two roundings of the largest value (inputs are about 1)."""
    error, allowed = ((t.double() - exact).square().mean().sqrt() for t in (found, eager))
    floor = torch.finfo(eager.dtype).eps * exact.abs().max().clamp_min(1)
    assert error <= slack * torch.maximum(allowed, floor), f"{error:.2e} against {allowed:.2e}"


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.177])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", SCHEDULES, ids=str)
def test_forward_and_gradients_are_as_accurate_as_eager(lengths, dtype, scale):
    tensors = inputs(lengths, dtype)
    weight = torch.randn(tensors[0].shape).to(dtype)
    results = []
    for function, kind in ((scale_causal_attention, dtype), (dense, dtype), (dense, torch.float64)):
        leaves = [t.to(kind).requires_grad_() for t in tensors]
        out = function(*leaves, lengths, scale)
        results.append([out.detach(), *torch.autograd.grad((out * weight.to(kind)).sum(), leaves)])
    for found, eager, exact in zip(*results, strict=True):
        assert found.dtype == dtype
        assert_as_accurate(found, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 17), (1, 1), (64, 100)])
def test_attention_is_as_accurate_as_pytorchs(n, m, dtype):
    q, k, v = (torch.randn(2, 3, t, 8).to(dtype) for t in (n, m, m))
    mask = torch.rand(n, m) < 0.7
    mask[:, 0] = True
    for chosen in (None, mask):
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=chosen, scale=0.3)
        eager = ((q @ k.mT) * 0.3).masked_fill(~(mask if chosen is not None else mask | True), float("-inf"))
        assert_as_accurate(attention(q, k, v, chosen, 0.3), eager.softmax(-1) @ v, exact)


@pytest.mark.parametrize("lengths", SCHEDULES, ids=str)
def test_gradcheck(lengths):
    lengths = tuple(min(n, 3) for n in lengths[:3])
    q, k, v = (t.double().requires_grad_() for t in inputs(lengths, d=2, batch=1, heads=1))
    assert torch.autograd.gradcheck(lambda q, k, v: scale_causal_attention(q, k, v, lengths, 0.7), (q, k, v))


@pytest.mark.parametrize("group", [0, 3, 14, 10_000])
def test_grouping_does_not_show(group, monkeypatch):
    lengths = (1, 4, 9, 16)
    q, k, v = (t.double() for t in inputs(lengths))
    monkeypatch.setattr(op, "_GROUP", group)
    torch.testing.assert_close(scale_causal_attention(q, k, v, lengths), dense(q, k, v, lengths, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finer_scales_are_invisible_and_the_own_scale_is_not(dtype):
    lengths = (2, 5, 40, 70)
    q, k, v = inputs(lengths, dtype)
    before = scale_causal_attention(q, k, v, lengths, 0.01)
    for i in range(1, len(lengths)):
        start, end = sum(lengths[:i]), sum(lengths[: i + 1])
        k2, v2 = k.clone(), v.clone()
        k2[:, :, end - 1] += 3
        v2[:, :, end - 1] += 100
        after = scale_causal_attention(q, k2, v2, lengths, 0.01)
        assert torch.equal(after[:, :, :start], before[:, :, :start])
        assert (after[:, :, start:] != before[:, :, start:]).any(-1).all()


def test_strided_inputs_are_read_as_their_values():
    lengths = (1, 4, 100)
    qkv = torch.randn(2, 105, 3, 4, 8).permute(2, 0, 3, 1, 4)
    assert not qkv[0].is_contiguous()
    torch.testing.assert_close(
        scale_causal_attention(*qkv, lengths), dense(*(t.contiguous() for t in qkv), lengths, 1.0)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_batch_stays_empty(dtype):
    assert scale_causal_attention(*inputs((1, 4, 100), dtype, batch=0), (1, 4, 100)).shape == (0, 3, 105, 16)


def test_what_does_not_fit_is_refused():
    q, k, v = inputs((1, 4))
    for args in (
        (q, k, v, (1, 3)),
        (q, k[:, :, :4], v, (1, 4)),
        (q, k, v[..., :3], (1, 4)),
        (q[0], k[0], v[0], (1, 4)),
    ):
        with pytest.raises(ValueError, match=r"want q, k, v \(B, H, \d, d\) for scales of .* tokens; got"):
            scale_causal_attention(*args)
