"""Block-causal attention: every implementation at most twice as far from float64 as PyTorch in the same dtype."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from mars import kernels
from mars.kernels import _backend, attention, cached_attention, scale_causal_attention
from mars.kernels.scale_causal_attention import availability, backends, heads, hybrid, op, reference, registered
from mars.runtime import native_bfloat16 as native_bfloat16_of

SCHEDULES = [
    (1,),
    (1, 4, 9),
    (1, 2, 7, 33),
    (50, 3, 100),  # not in order of size
    (159, 1, 5),  # the first group ends at a scale of one token
]
PYTORCH = ["reference", "hybrid", "grouped", "dense"]
CASES = [(name, dtype) for name in PYTORCH for dtype in (torch.float32, torch.bfloat16)]
CASES.remove(("reference", torch.bfloat16))  # rounds its scores, which the others do not
CASES += [("triton", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
NO_TRITON = _backend.missing("triton", "cpu")
needs_triton = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
EVERY = [*PYTORCH, pytest.param("triton", marks=needs_triton)]


def inputs(lengths, dtype=torch.float32, D=16, batch=2, heads=3):
    """q, k, v as the models pass them: views of one (B, L, 3, H, D)."""
    qkv = torch.randn(batch, sum(lengths), 3, heads, D).to(dtype)
    return list(qkv.permute(2, 0, 3, 1, 4))


def dense(q, k, v, lengths, scale, head_scale=None, shift=0.0):
    """Mask written out entry by entry; the normalisation too. shift is added to the scores."""
    if head_scale is not None:
        q = q / q.norm(dim=-1, keepdim=True) * head_scale.view(-1, 1, 1)
        k = k / k.norm(dim=-1, keepdim=True)
    scale_of = [i for i, n in enumerate(lengths) for _ in range(n)]
    hidden = torch.tensor([[a < b for b in scale_of] for a in scale_of])
    return ((q @ k.mT) * scale + shift).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def eager(q, k, v, lengths, scale, head_scale=None):
    """PyTorch's own: normalised in float32 and rounded, then one masked call."""
    if head_scale is not None:
        q, k = (F.normalize(t.float(), dim=-1) for t in (q, k))
        q, k = (q * head_scale.view(-1, 1, 1)).to(v.dtype), k.to(v.dtype)
    visible = torch.ones(len(lengths), len(lengths), dtype=torch.bool).tril()
    counts = torch.tensor(lengths)
    mask = visible.repeat_interleave(counts, 0).repeat_interleave(counts, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def outcome(function, tensors, lengths, scale, head_scale, do):
    """Output and gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    gain = None if head_scale is None else head_scale.detach().requires_grad_()
    out = function(*leaves, lengths, scale, head_scale=gain)
    grads = torch.autograd.grad(out, leaves if gain is None else [*leaves, gain], do.to(out.dtype))
    return [out.detach(), *grads]


def rms(x):
    return x.double().square().mean().sqrt()


def assert_as_accurate(found, eager, exact, slack=2.0):
    """The RMS error is at most `slack` times eager's, or that of one rounding, or of the float32 sums inside."""
    floor = 0.25 * torch.finfo(eager.dtype).eps * rms(exact) + 2e-7
    error, allowed = rms(found.double() - exact), torch.maximum(rms(eager.double() - exact), floor)
    assert error <= slack * allowed, f"{error:.2e} against {allowed:.2e} of {rms(exact):.2e} {tuple(exact.shape)}"


def assert_all_as_accurate(found, eager, exact, slack=2.0):
    """Of the results of `outcome`. The gradient of head_scale has too few values for an RMS to mean much, so there
    a rounding of the largest is allowed too."""
    for a, b, c in zip(found[:4], eager[:4], exact[:4], strict=True):
        assert_as_accurate(a, b, c, slack)
    for a, b, c in zip(found[4:], eager[4:], exact[4:], strict=True):
        floor = (torch.finfo(found[0].dtype).eps + 4 * torch.finfo(torch.float32).eps) * c.abs().max().clamp_min(1)
        assert rms(a.double() - c) <= slack * torch.maximum(rms(b.double() - c), floor)


def slack_of(name, dtype):
    """Triton's interpreter truncates to bfloat16, which is twice a rounding."""
    return 4.0 if name == "triton" and dtype == torch.bfloat16 else 2.0


@pytest.mark.parametrize("normalised", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("lengths", SCHEDULES, ids=str)
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_forward_and_gradients_are_as_accurate_as_eager(name, dtype, lengths, normalised):
    if name == "triton" and NO_TRITON is not None:
        pytest.skip(NO_TRITON)
    tensors = inputs(lengths, dtype, batch=1 if name == "triton" else 2)
    head_scale, scale = (torch.tensor([4.0, -2.5, 0.7]), 0.9) if normalised else (None, 0.25)
    do = torch.randn(tensors[0].shape).to(dtype)
    exact = outcome(
        dense, [t.double() for t in tensors], lengths, scale, head_scale.double() if normalised else None, do
    )
    rounded = outcome(eager, tensors, lengths, scale, head_scale, do)
    found = outcome(
        lambda *args, **kwargs: scale_causal_attention(*args, backend=name, **kwargs),
        tensors, lengths, scale, head_scale, do,
    )  # fmt: skip
    assert len(found) == 4 + normalised
    assert [t.dtype for t in found] == [dtype] * 4 + [torch.float32] * normalised
    assert_all_as_accurate(found, rounded, exact, slack_of(name, dtype))


@pytest.mark.parametrize(
    ("name", "D"),
    [(name, D) for name in PYTORCH for D in (8, 33, 64, 128)]
    + [pytest.param("triton", D, marks=needs_triton) for D in (32, 64, 128)],
)
def test_every_head_size(name, D):
    lengths, head_scale = (2, 30, 40), torch.tensor([3.0])
    tensors = inputs(lengths, D=D, batch=1, heads=1)
    do = torch.randn(tensors[0].shape)
    exact = outcome(dense, [t.double() for t in tensors], lengths, 1.0, head_scale.double(), do)
    rounded = outcome(eager, tensors, lengths, 1.0, head_scale, do)
    found = outcome(
        lambda *a, **kw: scale_causal_attention(*a, backend=name, **kw), tensors, lengths, 1.0, head_scale, do
    )
    assert_all_as_accurate(found, rounded, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["hybrid", "grouped", "dense"])
def test_sharp_attention_is_as_accurate_as_eager(name, dtype):
    """Logits to 100, as VAR's learned scales allow: scores rounded to bfloat16 would be off by 0.25."""
    lengths, head_scale = (1, 30, 200), torch.tensor([100.0, 50.0, 10.0])
    tensors = inputs(lengths, dtype)
    do = torch.randn(tensors[0].shape).to(dtype)
    rounded = [t.double() for t in reference.normalize(*tensors[:2], head_scale)] + [tensors[2].double()]
    own = [t.to(dtype) for t in rounded]
    exact = outcome(dense, rounded, lengths, 1.0, None, do)
    expected = outcome(eager, own, lengths, 1.0, None, do)
    actual = outcome(lambda *a, **kw: scale_causal_attention(*a, backend=name, **kw), own, lengths, 1.0, None, do)
    assert_all_as_accurate(actual, expected, exact)


@pytest.mark.parametrize("name", EVERY)
def test_logits_of_ten_thousand_stay_finite(name):
    """Such scores round by up to a tenth, each implementation's own way: outcomes are at most as far from exact as
    those of scores that are all off by what a sum of products may round. Keys come in near-pairs, so that the softmax
    has something to decide in every row."""
    lengths = (2, 4, 60)
    q, k, v = inputs(lengths, heads=1)
    q, k = q * 100, k * 100
    k[:, :, 1::2] = k[:, :, ::2] + 0.01 * torch.randn(k[:, :, ::2].shape)
    do = torch.randn(q.shape)
    tensors = [t.double() for t in (q, k, v)]
    exact = outcome(dense, tensors, lengths, 1.0, None, do)
    assert (tensors[0] @ tensors[1].mT).abs().max() > 1e4
    rounding = (q.shape[-1] + 4) * torch.finfo(torch.float32).eps / 2 * (tensors[0].abs() @ tensors[1].abs().mT)

    def off(q, k, v, lengths, scale, head_scale=None):
        return dense(q, k, v, lengths, scale, shift=rounding * (2 * torch.randint(2, rounding.shape) - 1))

    moved = [outcome(off, tensors, lengths, 1.0, None, do) for _ in range(16)]
    found = outcome(lambda *a, **kw: scale_causal_attention(*a, backend=name, **kw), (q, k, v), lengths, 1.0, None, do)
    for a, b, c in zip(found, zip(*moved, strict=True), exact, strict=True):
        error, allowed = rms(a.double() - c), rms(torch.stack(b) - c)
        assert error <= allowed, f"{error:.2e} against {allowed:.2e} of {rms(c):.2e} {tuple(c.shape)}"


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("how", ["equal keys", "scale 0", "head scale 0"])
def test_equal_scores_average_the_values(name, how):
    lengths = (2, 30, 70)
    q, k, v = inputs(lengths, heads=2)
    if how == "equal keys":
        k = k[:, :, :1].expand_as(k)
    head_scale = torch.zeros(2) if how == "head scale 0" else None
    out = scale_causal_attention(
        q, k, v, lengths, 0.0 if how == "scale 0" else 1.0, head_scale=head_scale, backend=name
    )
    for start, end in ((0, 2), (2, 32), (32, 102)):
        mean = v[:, :, :end].mean(2, keepdim=True).expand(-1, -1, end - start, -1)
        torch.testing.assert_close(out[:, :, start:end], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_a_zero_vector_stays_zero_when_normalised(name):
    """As torch.nn.functional.normalize has it, so every key scores 0 with it; its gradient is large, not NaN."""
    lengths = (1, 4)
    q, k, v = (t.clone() for t in inputs(lengths, batch=1, heads=1))
    q[0, 0, 3] = k[0, 0, 2] = 0
    actual = outcome(
        lambda *a, **kw: scale_causal_attention(*a, backend=name, **kw), (q, k, v), lengths, 1.0, torch.ones(1), v
    )
    expected = outcome(eager, (q.double(), k.double(), v.double()), lengths, 1.0, torch.ones(1).double(), v)
    torch.testing.assert_close(actual[0][0, 0, 3], v[0, 0].mean(0))
    assert all(torch.isfinite(t).all() for t in actual)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PYTORCH)
@pytest.mark.parametrize("normalised", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("lengths", [(3,), (1, 2), (2, 3, 1)], ids=str)
def test_gradcheck(lengths, normalised, name, monkeypatch):
    monkeypatch.setattr(backends, "GROUP", 3)
    q, k, v = (t.double().requires_grad_() for t in inputs(lengths, D=2, batch=1, heads=2))
    head_scale = torch.tensor([1.5, 0.5]).double().requires_grad_() if normalised else None

    def run(q, k, v, head_scale):
        return scale_causal_attention(q, k, v, lengths, 0.7, head_scale=head_scale, backend=name)

    assert torch.autograd.gradcheck(run, (q, k, v, head_scale))


@pytest.mark.parametrize("group", [0, 3, 14, 10_000])
@pytest.mark.parametrize("name", ["hybrid", "grouped"])
def test_grouping_does_not_show(name, group, monkeypatch):
    lengths = (1, 4, 9, 16)
    q, k, v = (t.double() for t in inputs(lengths))
    do = torch.randn_like(q)
    monkeypatch.setattr(backends, "GROUP", group)
    found = outcome(lambda *a, **kw: scale_causal_attention(*a, backend=name, **kw), (q, k, v), lengths, 1.0, None, do)
    for a, b in zip(found, outcome(dense, (q, k, v), lengths, 1.0, None, do), strict=True):
        torch.testing.assert_close(a, b)


def test_groups_join_short_scales_in_order():
    lengths = [n * n for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
    assert backends.groups(lengths) == [(0, 255, tuple(lengths[:8])), (255, 424, (169,)), (424, 680, (256,))]
    assert backends.groups([1, 4, 9]) == [(0, 14, (1, 4, 9))]
    assert backends.groups([500, 1, 1]) == [(0, 500, (500,)), (500, 502, (1, 1))]


@pytest.mark.parametrize("scores", [1, 2 * 50 * 70, 1 << 20], ids=["one head", "two heads", "all heads"])
@pytest.mark.parametrize(
    ("kept", "native"), [(True, True), (False, True), (False, False)], ids=["kept", "recomputed", "widened"]
)
def test_heads_at_a_time_do_not_show(scores, kept, native, monkeypatch):
    lengths = (20, 50)
    monkeypatch.setattr(hybrid, "PROCESSOR", hybrid.Processor(native, native))
    monkeypatch.setattr(backends, "GROUP", 10)
    monkeypatch.setattr(hybrid, "_SCORES", {2: scores, 4: scores, 8: scores})
    monkeypatch.setattr(hybrid, "KEPT", 1 << 20 if kept or not native else 0)
    assert (hybrid.saved_numel(torch.empty(3, 5, 70, 16, dtype=torch.bfloat16), lengths) > 0) == kept
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        tensors = inputs(lengths, dtype, heads=5, batch=3)
        do = torch.randn(tensors[0].shape).to(dtype)
        for gain in (None, torch.tensor([3.0, -1.0, 2.0, 0.1, 5.0])):
            exact_gain = None if gain is None else gain.double()
            exact = outcome(dense, [t.double() for t in tensors], lengths, 0.3, exact_gain, do)
            rounded = outcome(eager, tensors, lengths, 0.3, gain, do)
            found = outcome(
                lambda *a, **kw: scale_causal_attention(*a, backend="hybrid", **kw), tensors, lengths, 0.3, gain, do
            )
            assert_all_as_accurate(found, rounded, exact)


@pytest.fixture
def native_bfloat16(monkeypatch):
    monkeypatch.setattr(hybrid, "PROCESSOR", hybrid.Processor(amx=True, bfloat16=True))


def test_the_processor_is_that_of_pytorch():
    assert hybrid.PROCESSOR.bfloat16 == native_bfloat16_of(torch.device("cpu"))
    assert hybrid.PROCESSOR.bfloat16 or not hybrid.PROCESSOR.amx


@pytest.mark.usefixtures("native_bfloat16")
def test_weights_are_kept_up_to_64_mib_of_16_bits():
    def kept(heads, dtype):
        return hybrid.saved_numel(torch.empty(1, heads, 2048, 16, dtype=dtype, device="meta"), (2048,))

    assert kept(8, torch.bfloat16) == kept(8, torch.float16) == 8 * 2048 * 2048 == 2**26 // 2
    assert kept(9, torch.bfloat16) == kept(1, torch.float32) == 0


@pytest.mark.usefixtures("native_bfloat16")
def test_weights_are_kept_for_a_backward_only():
    q, k, v = (t.bfloat16() for t in inputs((1, 4)))
    for keep, values in ((False, 0), (True, 2 * 3 * 5 * 5)):
        assert len(registered.hybrid_attention(q, k, v, None, (1, 4), 1.0, keep)[1]) == values
    called = []
    original = registered._hybrid_attention

    def spy(*args):
        called.append(args[-1])
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registered, "_hybrid_attention", spy)
        gain = torch.ones(q.shape[1])
        scale_causal_attention(q, k, v, (1, 4), head_scale=gain)
        scale_causal_attention(q, k.requires_grad_(), v, (1, 4), head_scale=gain)
        with torch.no_grad():
            scale_causal_attention(q, k, v, (1, 4), head_scale=gain)
    assert called == [False, True, False]


@pytest.mark.parametrize("name", EVERY)
def test_finer_scales_are_invisible_and_the_own_scale_is_not(name):
    lengths = (2, 5, 40, 70)
    q, k, v = inputs(lengths, batch=1, heads=1)
    before = scale_causal_attention(q, k, v, lengths, 0.01, backend=name)
    for i in range(1, len(lengths)):
        start, end = sum(lengths[:i]), sum(lengths[: i + 1])
        k2, v2 = k.clone(), v.clone()
        k2[:, :, end - 1] += 3
        v2[:, :, end - 1] += 100
        after = scale_causal_attention(q, k2, v2, lengths, 0.01, backend=name)
        assert torch.equal(after[:, :, :start], before[:, :, :start])
        assert (after[:, :, start:] != before[:, :, start:]).any(-1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("of", ["keys", "values"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PYTORCH)
def test_what_is_not_finite_in_a_finer_scale_does_not_reach_coarser_rows(name, dtype, of, bad):
    """In the groups before, in the same group, and in the same group of single scales; with gradients and without."""
    lengths, head_scale = (2, 5, 40, 120, 9, 11), torch.tensor([4.0, -2.5])
    tensors = inputs(lengths, dtype, heads=2)
    do = torch.randn(tensors[0].shape).to(dtype)
    for place, start in ((6, 2), (40, 7), (100, 47), (170, 167), (186, 176)):
        q, k, v = (t.clone() for t in tensors)
        (k if of == "keys" else v)[:, :, place, 3] = bad
        rows = slice(0, start)
        for gain, scale in ((None, 0.25), (head_scale, 1.0)):
            with torch.no_grad():
                out = scale_causal_attention(q, k, v, lengths, scale, head_scale=gain, backend=name)
            assert math.isinf(bad) or out[:, :, place].isnan().any()
            exact = [t[:, :, rows].double() for t in (q, k, v)]
            seen = [n for i, n in enumerate(lengths) if sum(lengths[: i + 1]) <= start]
            coarse = do.clone()
            coarse[:, :, start:] = 0
            expected = outcome(dense, exact, seen, scale, None if gain is None else gain.double(), coarse[:, :, rows])
            actual = outcome(
                lambda *a, **kw: scale_causal_attention(*a, backend=name, **kw), (q, k, v), lengths, scale, gain, coarse
            )
            tolerance = 1e-5 if dtype == torch.float32 else 0.1
            for part in (out, *actual[:2]):  # the output and the gradient of the queries
                other = expected[1] if part is actual[1] else expected[0]
                torch.testing.assert_close(part[:, :, rows].double(), other, rtol=tolerance, atol=tolerance)


def test_queries_that_are_not_finite_leave_the_gradients_of_hidden_keys_alone():
    lengths = (2, 5, 40)
    q, k, v = inputs(lengths, torch.bfloat16, heads=2)
    q = q.clone()
    q[:, :, 1, 3] = float("nan")
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = scale_causal_attention(*leaves, lengths, 0.25, backend="hybrid")
    dq, dk, dv = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert dk[:, :, :2].isnan().any()
    assert all(t[:, :, 2:].isfinite().all() for t in (dq, dk, dv))


def test_a_compiled_graph_of_the_cpus_own_keeps_what_is_hidden():
    lengths = (2, 5, 40)
    q, k, v = inputs(lengths, heads=2)
    k = k.clone()
    k[:, :, 20] = float("nan")
    compiled = torch.compile(scale_causal_attention, fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v, lengths, 0.25, head_scale=torch.ones(2))
    torch._dynamo.reset()
    assert out[:, :, :7].isfinite().all()
    assert out[:, :, 7:].isnan().all()


def test_large_values_are_no_reason_to_compute_twice(monkeypatch):
    """Where the sums are finite, no other implementation is asked."""
    monkeypatch.setattr(backends, "per_scale", None)
    for name in PYTORCH:
        q, k, v = inputs((2, 5, 40))
        assert scale_causal_attention(q, k, v * 1e30, (2, 5, 40), 0.25, backend=name).isfinite().all()


def test_the_default_scale_is_that_of_pytorchs_attention():
    lengths = (1, 4)
    q, k, v = inputs(lengths)
    for name in PYTORCH:
        out = scale_causal_attention(q, k, v, lengths, backend=name)
        mask = torch.tensor([[True] + [False] * 4] + [[True] * 5] * 4)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask), rtol=1e-5, atol=1e-5)
    for n in (2, 5):
        exact = F.scaled_dot_product_attention(q[:, :, :n], k, v)
        torch.testing.assert_close(attention(q[:, :, :n], k, v), exact, rtol=1e-5, atol=1e-5)
    step = cached_attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], k.clone(), v.clone(), 1)
    torch.testing.assert_close(step, out[:, :, 1:], rtol=1e-5, atol=1e-5)


def test_a_scale_for_each_head_takes_the_place_of_the_default():
    lengths, gain = (1, 4), torch.rand(inputs((1,))[0].shape[1]) + 1
    q, k, v = inputs(lengths)
    exact = dense(q.double(), k.double(), v.double(), lengths, 1.0, head_scale=gain.double())
    for name in PYTORCH:
        out = scale_causal_attention(q, k, v, lengths, head_scale=gain, backend=name)
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    step = cached_attention(*(x[:, :, 1:] for x in (q, k, v)), F.normalize(k, dim=-1), v.clone(), 1, head_scale=gain)
    torch.testing.assert_close(step.double(), exact[:, :, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("how", ["other dimension last", "values apart", "shared by all heads", "own layouts"])
def test_strided_inputs_are_read_as_their_values(how, name):
    lengths, shape = (1, 4, 60), (2, 3, 65, 16)
    q, k, v = {
        "other dimension last": lambda: [torch.randn(2, 3, 16, 65).mT for _ in range(3)],
        "values apart": lambda: [torch.randn(2, 3, 65, 32)[..., ::2] for _ in range(3)],
        "shared by all heads": lambda: [torch.randn(2, 1, 65, 16).expand(shape) for _ in range(3)],
        "own layouts": lambda: [
            torch.randn(3, 65, 2, 16).permute(2, 0, 1, 3),
            torch.randn(shape),
            torch.randn(2, 65, 3, 16).transpose(1, 2),
        ],
    }[how]()
    do = torch.randn(2, 1, 65, 1).expand(shape)
    found = outcome(lambda *a, **kw: scale_causal_attention(*a, backend=name, **kw), (q, k, v), lengths, 0.2, None, do)
    for a, b in zip(found, outcome(dense, (q, k, v), lengths, 0.2, None, do), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [None, *EVERY])
def test_an_empty_batch_stays_empty(name, dtype):
    tensors = inputs((1, 4, 100), dtype, batch=0)
    out, dq, dk, dv, dg = outcome(
        lambda *a, **kw: scale_causal_attention(*a, backend=name, **kw),
        tensors, (1, 4, 100), 1.0, torch.ones(3), tensors[0],
    )  # fmt: skip
    assert out.shape == dq.shape == dk.shape == dv.shape == (0, 3, 105, 16)
    assert torch.equal(dg, torch.zeros(3))


@pytest.mark.parametrize("name", ["hybrid", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("normalised", [False, True], ids=["raw", "normalised"])
def test_ops_are_well_formed(name, normalised):
    lengths = [2, 5]
    q, k, v = (t.detach().requires_grad_() for t in inputs(lengths, batch=1, heads=2))
    if name == "hybrid":
        q, k, v = (t.detach().bfloat16().requires_grad_() for t in (q, k, v))
        gain = torch.rand(2, requires_grad=True) if normalised else None
        for keep in (True, False):
            torch.library.opcheck(
                torch.ops.mars.hybrid_attention.default, (q, k, v, gain, lengths, 0.5, keep), atol=1e-2, rtol=0
            )
        return
    head_scale = torch.rand(2, requires_grad=True) if normalised else None
    torch.library.opcheck(torch.ops.mars.scale_causal_attention.default, (q, k, v, head_scale, lengths, 0.5))


@pytest.mark.parametrize("kernels_of", ["auto", "reference", pytest.param("triton", marks=needs_triton)])
def test_it_compiles_to_one_graph(kernels_of):
    lengths = (1, 4, 9)
    tensors, head_scale = inputs(lengths), torch.tensor([3.0, 1.0, 2.0])
    do = torch.randn_like(tensors[0])
    compiled = torch.compile(scale_causal_attention, fullgraph=True, backend="aot_eager")
    with kernels.use(kernels_of):
        found = outcome(compiled, tensors, lengths, 0.5, head_scale, do)
    torch._dynamo.reset()
    for a, b in zip(found, outcome(dense, tensors, lengths, 0.5, head_scale, do), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("lengths", SCHEDULES, ids=str)
@torch.no_grad()
def test_cached_steps_are_the_whole(lengths, name):
    q, k, v = inputs(lengths, D=16, batch=1, heads=2)
    for head_scale in (None, torch.tensor([7.0, 0.5])):
        whole = scale_causal_attention(q, k, v, lengths, 0.5, head_scale=head_scale, backend=name)
        keys, values = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
        start = 0
        for n in lengths:
            part = slice(start, start + n)
            step = cached_attention(
                q[:, :, part], k[:, :, part], v[:, :, part], keys, values, start, 0.5, head_scale=head_scale
            )
            torch.testing.assert_close(step, whole[:, :, part], rtol=1e-5, atol=1e-5)
            start += n
        assert torch.equal(values, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 17), (1, 1), (64, 100)])
def test_attention_is_as_accurate_as_pytorchs(n, m, dtype):
    q, k, v = (torch.randn(2, 3, t, 8).to(dtype) for t in (n, m, m))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3)
    rounded = ((q @ k.mT) * 0.3).softmax(-1) @ v
    assert_as_accurate(attention(q, k, v, 0.3), rounded, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_casts_as_for_a_matrix_product(dtype):
    q, k, v = inputs((1, 4), dtype)
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        out = scale_causal_attention(q, k, v, (1, 4), head_scale=torch.ones(3))
        assert attention(q, k[:, :, :3], v[:, :, :3]).dtype == torch.bfloat16
        assert scale_causal_attention(q.double(), k.double(), v.double(), (1, 4)).dtype == torch.float64
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert q.grad.dtype == k.grad.dtype == v.grad.dtype == dtype
    exact = dense(q.double(), k.double(), v.double(), (1, 4), 1.0, torch.ones(3).double())
    assert rms(out.double() - exact) < 0.01 * rms(exact)


def test_a_backward_under_autocast_keeps_its_dtype():
    lengths = (20, 50)
    q, k, v = (t.detach().requires_grad_() for t in inputs(lengths))
    out = scale_causal_attention(q, k, v, lengths, backend="hybrid")
    do = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), do, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(out, (q, k, v), do)
    assert all(map(torch.equal, actual, expected))


XEON, ZEN_5, ZEN_3 = hybrid.Processor(True, True), hybrid.Processor(False, True), hybrid.Processor(False, False)
ONE, TWO = (9, 160), (160, 9)  # groups


@pytest.mark.parametrize(
    ("processor", "dtype", "lengths", "raw", "normalised"),
    [
        (XEON, torch.float32, TWO, "hybrid", "hybrid"),
        (XEON, torch.float32, ONE, "grouped", "hybrid"),
        (XEON, torch.bfloat16, TWO, "hybrid", "hybrid"),
        (XEON, torch.bfloat16, ONE, "grouped", "hybrid"),
        (ZEN_5, torch.float32, TWO, "hybrid", "hybrid"),
        (ZEN_5, torch.float32, ONE, "grouped", "grouped"),
        (ZEN_5, torch.bfloat16, TWO, "hybrid", "hybrid"),
        (ZEN_5, torch.bfloat16, ONE, "hybrid", "hybrid"),
        (ZEN_3, torch.float32, ONE, "grouped", "grouped"),
        (ZEN_3, torch.bfloat16, TWO, "hybrid", "hybrid"),
        (ZEN_3, torch.bfloat16, ONE, "hybrid", "hybrid"),
        (ZEN_3, torch.float64, TWO, "hybrid", "hybrid"),
        (XEON, torch.float16, TWO, "grouped", "grouped"),
        (ZEN_5, torch.float16, TWO, "grouped", "grouped"),
    ],
)
def test_a_processor_takes_what_was_measured_fastest_on_its_kind(
    processor, dtype, lengths, raw, normalised, monkeypatch
):
    monkeypatch.setattr(hybrid, "PROCESSOR", processor)
    q = torch.empty(1, 1, sum(lengths), 16, dtype=dtype)
    with kernels.use("auto"):
        assert op._chosen(None, q, lengths, False) == raw
        assert op._chosen(None, q, lengths, True) == normalised


@pytest.mark.parametrize(
    ("kernels_of", "dtype", "D", "wanted"),
    [
        ("auto", torch.float32, 16, "hybrid"),
        ("native", torch.float32, 16, "hybrid"),
        ("reference", torch.float32, 16, "reference"),
        pytest.param("triton", torch.float32, 16, "triton", marks=needs_triton),
        pytest.param("triton", torch.float32, 24, "hybrid", marks=needs_triton),
        pytest.param("triton", torch.float64, 16, "hybrid", marks=needs_triton),
    ],
)
def test_what_is_chosen_automatically(kernels_of, dtype, D, wanted):
    q = torch.empty(1, 1, 169, D, dtype=dtype)
    with kernels.use(kernels_of):
        assert op._chosen(None, q, TWO, False) == op._chosen(None, q, TWO, True) == wanted
        assert op._chosen("dense", q, TWO, False) == "dense"


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "lengths", "wanted"),
    [
        (torch.bfloat16, TWO, "triton"),
        (torch.float16, TWO, "triton"),
        (torch.float32, TWO, "grouped"),
        (torch.float64, TWO, "grouped"),
        (torch.bfloat16, (169,), "dense"),
        (torch.float32, (169,), "dense"),
    ],
    ids=str,
)
def test_cuda_takes_what_was_measured_fastest_there(dtype, lengths, wanted):
    q = torch.empty(1, 1, 169, 64, dtype=dtype)
    with _backend.planned("cuda"):
        for normalised in (False, True):
            assert op._chosen(None, q, lengths, normalised) == wanted
        with kernels.use("triton"):  # asked for by name
            assert op._chosen(None, q, TWO, False) == ("grouped" if dtype == torch.float64 else "triton")


def test_packages_are_called_for_single_scales_alone(monkeypatch):
    calls = []

    def unmasked(q, k, v, scale):
        calls.append((q.shape[2], k.shape[2]))
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    lengths = [n * n for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
    q, k, v = inputs(lengths, heads=1, batch=1)
    found = backends._by_group(q, k, v, lengths, 0.25, unmasked)
    assert calls == [(169, 424), (256, 680)]
    torch.testing.assert_close(found, dense(q, k, v, lengths, 0.25), rtol=1e-4, atol=1e-5)


def test_devices_without_kernels_of_our_own_take_pytorchs():
    q = torch.empty(1, 1, 169, 16, device="meta")
    assert op._chosen(None, q, (160, 9), True) == "grouped"
    assert scale_causal_attention(q, q, q, (160, 9), head_scale=q[0, :, 0, 0]).shape == q.shape


@pytest.mark.parametrize(
    ("kernels_of", "runs"),
    [("auto", "hybrid"), ("reference", "reference"), pytest.param("triton", "triton", marks=needs_triton)],
)
def test_the_choice_is_what_runs(kernels_of, runs, monkeypatch):
    called = []
    for name, original in op._TABLE.items():

        def spy(*args, original=original, name=name):
            called.append(name)
            return original(*args)

        monkeypatch.setitem(op._TABLE, name, spy)
    with kernels.use(kernels_of):
        scale_causal_attention(*inputs((160, 4)), (160, 4))
    assert called == [runs]


def in_a_process(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_the_environment_chooses():
    code = "import torch; from mars.kernels import scale_causal_attention as f; f(*torch.ones(3, 1, 1, 5, 24), (1, 4))"
    refused = in_a_process(code, MARS_ATTENTION="fast")
    assert "MARS_ATTENTION: want one of auto, triton, hybrid, grouped" in refused.stderr
    missing = in_a_process(code, MARS_ATTENTION="triton", TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert "KernelError: scale_causal_attention: triton cannot run: " in missing.stderr
    code += "; import sys; print('triton' in sys.modules)"
    for gone in ("math", "per_scale"):  # for benchmarks alone
        assert (
            f"MARS_ATTENTION: want one of auto, {', '.join(op.BACKENDS)}, got '{gone}'"
            in in_a_process(code, MARS_ATTENTION=gone).stderr
        )
    found = in_a_process(code, MARS_ATTENTION="grouped")
    assert (found.stdout, found.returncode) == ("False\n", 0)


def test_availability_says_why_not():
    found = availability("cpu")
    assert set(found) == set(op.BACKENDS)
    assert all(found[name] is None for name in PYTORCH)
    assert "NotImplementedError" in found["flex"]
    assert "backward" in found["flex"]
    assert availability("cuda")["hybrid"] == "it runs on the CPU"
    q, k, v = inputs((1, 4))
    with pytest.raises(RuntimeError, match="flex cannot run: NotImplementedError"):
        scale_causal_attention(q, k, v, (1, 4), backend="flex")


def package_of(name, attend):
    """A module with the one function that a package is used for; its tensors are (B, tokens, H, D)."""

    def call(q, k, v, *, softmax_scale=None, scale=None):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attend(q, k, v, softmax_scale if name == "flash" else scale).transpose(1, 2)

    if name == "flash":
        module = types.ModuleType("flash_attn")
        module.flash_attn_func = call
        return {"flash_attn": module}
    module, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    module.ops, ops.memory_efficient_attention = ops, call
    return {"xformers": module, "xformers.ops": ops}


@pytest.fixture
def install(monkeypatch):
    """Put a stand-in for a package in place; what was found out about the real one is forgotten, before and after."""
    op._tried.cache_clear()

    def put(name, attend):
        for key, module in package_of(name, attend).items():
            module.__spec__ = types.SimpleNamespace(name=key)
            monkeypatch.setitem(sys.modules, key, module)

    yield put
    op._tried.cache_clear()


@pytest.mark.parametrize("name", ["flash", "xformers"])
def test_a_package_that_works_is_used(name, install):
    install(name, lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, scale=scale))
    assert availability("cpu")[name] is None
    lengths, tensors, head_scale = (1, 4, 9), inputs((1, 4, 9)), torch.tensor([1.0, 2.0, 3.0])
    do = torch.randn_like(tensors[0])
    found = outcome(
        lambda *a, **kw: scale_causal_attention(*a, backend=name, **kw), tensors, lengths, 0.3, head_scale, do
    )
    for a, b in zip(found, outcome(dense, tensors, lengths, 0.3, head_scale, do), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def raises(q, k, v, scale):
    raise OSError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (raises, "OSError: no kernel image"),
        (lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, scale=2 * scale), "it is off by .* rounding"),
        (lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v.detach(), scale=scale), "it is off by"),
        (lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, scale=scale) * 1.00005, "it is off by"),
    ],
)
@pytest.mark.parametrize("name", ["flash", "xformers"])
def test_a_package_that_does_not_work_is_refused(name, attend, why, install):
    install(name, attend)
    with pytest.raises(RuntimeError, match=f"{name} cannot run: {why}"):
        scale_causal_attention(*inputs((1, 4)), (1, 4), backend=name)


def test_a_package_that_is_not_there_is_named():
    for name, package in (("flash", "flash-attn"), ("xformers", "xformers")):
        why = availability("cpu")[name]
        if why is not None and "not installed" in why:
            assert why == f"{package} is not installed: pip install {package}"


def test_what_does_not_fit_is_refused():
    q, k, v = inputs((1, 4))
    for args in (
        (q, k, v, (1, 3)),
        (q, k, v, (1, 0, 4)),
        (q, k, v, (6, -1)),
        (q, k, v, ()),
        (q[:, :, :4], k, v, (1, 4)),
        (q[:, :, :4], k, v, (1, 3)),
    ):
        with pytest.raises(ValueError, match=r"want q, k, v \(B, H, \d, D\) for scales of .* tokens, each 1 or more"):
            scale_causal_attention(*args)
    for args in ((q, k[:, :, :4], v), (q, k, v[..., :3]), (q[0], k[0], v[0]), (q[:1], k, v), (q[..., :3], k, v)):
        with pytest.raises(ValueError, match=r"want q, k, v \(B, H, tokens, D\), k and v alike; got"):
            scale_causal_attention(*args, (1, 4))
        with pytest.raises(ValueError, match=r"attention: want q, k, v \(B, H, tokens, D\)"):
            attention(*args)
    for tensors in ((q, k.double(), v), (q, k, v.bfloat16()), (q.long(), k.long(), v.long())):
        with pytest.raises(ValueError, match="of one float dtype, got"):
            scale_causal_attention(*tensors, (1, 4))
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="want a finite scale of 0 or more, got"):
            scale_causal_attention(q, k, v, (1, 4), scale)
    for head_scale in (torch.ones(2), torch.ones(1, 3), torch.ones(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"want head_scale \(3,\) of a float dtype, got"):
            scale_causal_attention(q, k, v, (1, 4), head_scale=head_scale)
    with pytest.raises(ValueError, match=r"want a backend of triton, .*; got 'cudnn'"):
        scale_causal_attention(q, k, v, (1, 4), backend="cudnn")


@needs_triton
def test_triton_refuses_by_name_what_its_kernels_do_not_take():
    for D, dtype in ((24, torch.float32), (256, torch.float32), (16, torch.float64)):
        q, k, v = inputs((1, 4), dtype, D=D)
        with pytest.raises(ValueError, match=f"want heads of 16, 32, 64, 128 values .*; got {D} in {dtype}"):
            scale_causal_attention(q, k, v, (1, 4), backend="triton")


def test_a_cache_that_does_not_fit_is_refused():
    q, k, v = inputs((1, 4))
    keys, values = torch.zeros_like(k), torch.zeros_like(v)
    for args in (
        (q, k, v, keys, values, 1),
        (q, k, v, keys, values, -1),
        (q[:, :, :4], k, v, keys, values, 0),
        (q, k, v, keys[:, :2], values, 0),
        (q, k, v, keys, values[..., :8], 0),
        (q, k, v, keys[0], values[0], 0),
        (q, k, v, keys, values.double(), 0),
    ):
        with pytest.raises(ValueError, match=r"cached_attention: want k, v like q and keys, values \(B, H, \d or more"):
            cached_attention(*args)


class TestTriton:
    """What only the kernels have."""

    pytestmark = needs_triton

    def test_the_models_views_are_read_in_place(self):
        from mars.kernels.scale_causal_attention import triton

        for t in inputs((1, 4)):
            assert not t.is_contiguous()
            assert triton._readable(t) is t
        for t in (torch.zeros(1, 1, 2, 32)[..., ::2], torch.zeros(1).expand(1, 1, 2, 16)):
            assert triton._readable(t).stride(-1) == 1
        apart = torch.zeros(1).as_strided((1, 1, 1, 16), (1, 1, 2**24, 0))
        assert triton._readable(apart).stride(2) == 16

    @pytest.mark.parametrize("L", [31, 32, 33, 63, 64, 65, 96, 128, 129])
    def test_tile_edges(self, L):
        head_scale = torch.tensor([2.0])
        for lengths in ((L,), (1, L - 1), (L - 1, 1)):
            tensors = inputs(lengths, torch.float16, batch=1, heads=1)
            do = torch.randn(tensors[0].shape).half()
            exact = outcome(dense, [t.double() for t in tensors], lengths, 1.0, head_scale.double(), do)
            rounded = outcome(eager, tensors, lengths, 1.0, head_scale, do)
            found = outcome(
                lambda *a, **kw: scale_causal_attention(*a, backend="triton", **kw),
                tensors, lengths, 1.0, head_scale, do,
            )  # fmt: skip
            assert_all_as_accurate(found, rounded, exact)

    def test_offsets_past_32_bits(self):
        """A batch stride of 2**31 values; the storage is never touched in between."""
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            storage = torch.empty(2**31 + 2**12, dtype=torch.float16)
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = True
        q = storage.as_strided((2, 1, 40, 16), (2**31, 16, 16, 1)).copy_(torch.randn(2, 1, 40, 16))
        k, v = torch.randn(2, 2, 1, 40, 16).half()
        actual, expected = (scale_causal_attention(x, k, v, (10, 30), backend="triton") for x in (q, q.clone()))
        assert torch.equal(actual, expected)

    def test_every_launched_tile_is_listed(self):
        from mars.kernels.scale_causal_attention import triton

        listed = {
            (c.kernel.fn.__name__, c.constants["D"], c.constants["BLOCK_M"], c.constants["BLOCK_N"], c.warps, c.stages)
            for c in triton.CONFIGS
        }
        for name, kernel in triton._KERNELS.items():
            for D in heads.TRITON_SIZES:
                for bits in (16, 32):
                    assert (kernel.fn.__name__, D, *triton.tile(name, D, bits)) in listed
