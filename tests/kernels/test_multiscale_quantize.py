"""The multi-scale quantiser as an operation, against `tests.reference_var` in float64."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from mars.kernels import dequantize_scale, multiscale_quantize
from tests import reference_var

SCHEDULES = [
    ((1, 1),),
    ((5, 3),),
    ((1, 1), (2, 2), (3, 3), (5, 5)),
    ((2, 1), (3, 2), (4, 2), (7, 3)),
    ((1, 2), (1, 2), (3, 8)),
    ((1, 1), (4, 4), (4, 4)),  # the full grid twice: neither is resized
]


def arguments(scales, phi=2, batch=2, dim=5, codes=40):
    f = torch.randn(batch, dim, *scales[-1])
    codebook = torch.randn(codes, dim) * torch.rand(codes, 1).add(0.2)
    weight, bias = torch.randn(phi, dim, dim, 3, 3) / 6, torch.randn(phi, dim) / 6
    return f, codebook, weight, bias, [k % phi for k in range(len(scales))]


def expected(f, codebook, weight, bias, which, scales, metric, ratio, keep=None):
    phis = list(zip(weight.double(), bias.double(), strict=True))
    f, codebook = f.double(), codebook.double()
    return reference_var.quantize(
        f, codebook, phis, which, list(scales), metric=metric, ratio=ratio, beta=0.0, keep=keep
    )


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scales", SCHEDULES, ids=str)
def test_tokens_and_running_sums_are_the_references(scales, metric, ratio):
    args = arguments(scales)
    ids, totals = multiscale_quantize(*args, scales, metric=metric, ratio=ratio)
    wanted, _, _, running = expected(*args, scales, metric, ratio)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, wanted)
    assert_close(totals.double(), torch.stack(running), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_samples_are_independent(batch):
    scales = SCHEDULES[3]
    f, *rest = arguments(scales, batch=batch)
    ids, totals = multiscale_quantize(f, *rest, scales)
    for b in range(batch):
        one, sums = multiscale_quantize(f[b : b + 1], *rest, scales)
        assert torch.equal(one, ids[b : b + 1])
        assert_close(sums, totals[:, b : b + 1], rtol=1e-5, atol=1e-6)


def test_what_is_not_kept_is_left_out_of_the_sums_only():
    scales = SCHEDULES[2]
    args = arguments(scales, batch=4)
    keep = [4, 1, 2, 3]
    ids, totals = multiscale_quantize(*args, scales, metric="l2", keep=torch.tensor(keep))
    full, every = multiscale_quantize(*args, scales, metric="l2")
    assert torch.equal(ids, full)
    for b, n in enumerate(keep):
        for k in range(len(scales)):
            assert torch.equal(totals[k, b], every[min(k, n - 1), b])


def test_scale_ids_run_row_by_row():
    codebook = torch.eye(6) * 3
    ids = torch.tensor([[0, 1, 2, 3, 4, 5]])
    still = torch.zeros(6, 6, 3, 3), torch.zeros(6)
    h = dequantize_scale(ids, codebook, *still, (2, 3), (2, 3), 0.0)
    assert torch.equal(h[0].argmax(0), torch.tensor([[0, 1, 2], [3, 4, 5]]))


def test_gradients_of_the_sums_are_the_references():
    scales = SCHEDULES[3]
    f, *weights, which = arguments(scales)
    weights = [w.requires_grad_() for w in weights]
    exact = [w.detach().double().requires_grad_() for w in weights]
    factors = torch.randn(len(scales), len(f), *f.shape[1:])
    _, totals = multiscale_quantize(f.requires_grad_(), *weights, which, scales, metric="l2")
    got = torch.autograd.grad((totals * factors).sum(), [f, *weights], allow_unused=True)
    codebook, weight, bias = exact
    phis = list(zip(weight, bias, strict=True))
    *_, running = reference_var.quantize(
        f.detach().double(), codebook, phis, which, list(scales), metric="l2", ratio=0.5, beta=0.0
    )
    wanted = torch.autograd.grad((torch.stack(running) * factors.double()).sum(), exact)
    assert got[0] is None  # only the values of f are used
    for a, b in zip(got[1:], wanted, strict=True):
        assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_strided_map_is_read_as_its_values():
    scales = SCHEDULES[3]
    f, *rest = arguments(scales)
    strided = f.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not strided.is_contiguous()
    for a, b in zip(multiscale_quantize(strided, *rest, scales), multiscale_quantize(f, *rest, scales), strict=True):
        assert_close(a, b)


def test_the_map_is_not_changed():
    scales = SCHEDULES[2]
    f, *rest = arguments(scales)
    before = f.clone()
    multiscale_quantize(f, *rest, scales)
    assert torch.equal(f, before)


@pytest.mark.parametrize(
    ("shape", "codebook", "scales", "which", "message"),
    [
        ((3, 4, 4), (8, 3), ((4, 4),), [0], r"want f \(B, D, H, W\)"),
        ((1, 3, 4, 4), (8, 2), ((4, 4),), [0], r"codebook \(V, D\); got \(1, 3, 4, 4\), \(8, 2\)"),
        ((1, 3, 4, 4), (8, 3), ((1, 1), (4, 5)), [0, 0], r"must be f's grid \(4, 4\)"),
        ((1, 3, 4, 4), (8, 3), ((1, 1), (4, 4)), [0], "one entry per scale, got 1"),
    ],
)
def test_what_does_not_fit_is_refused(shape, codebook, scales, which, message):
    with pytest.raises(ValueError, match=message):
        multiscale_quantize(
            torch.zeros(shape), torch.zeros(codebook), torch.zeros(1, 3, 3, 3, 3), torch.zeros(1, 3), which, scales
        )
