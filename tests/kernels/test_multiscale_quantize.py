"""The multi-scale quantiser as an operation, against `tests.reference_var` in float64, on every implementation."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mars import kernels
from mars.config import preset
from mars.kernels import _backend, _native, area_downsample, dequantize_scale, multiscale_quantize
from mars.kernels.multiscale_quantize import op, reference
from mars.kernels.multiscale_quantize.resampling import bicubic_matrix
from mars.models.quantizer import phi_index
from tests import reference_var
from tests.implementations import NATIVE, running

NO_TRITON = _backend.missing("triton", "cpu")
needs_triton = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
SCHEDULES = [
    ((1, 1),),
    ((5, 3),),
    ((1, 1), (2, 2), (3, 3), (5, 5)),
    ((2, 1), (3, 2), (4, 2), (7, 3)),
    ((1, 2), (1, 2), (3, 8)),
    ((1, 1), (4, 4), (4, 4)),  # the full grid twice: neither is resized
    ((1, 1), (1, 9), (2, 19)),
]


@pytest.fixture(params=["reference", *NATIVE])
def implementation(request):
    with running(request.param):
        yield request.param


def test_autocast_lowers_nothing(implementation):
    f, codebook, weight = torch.randn(2, 8, 4, 4), torch.randn(50, 8), torch.randn(1, 8, 8, 3, 3) / 9
    bias = torch.zeros(1, 8)
    for t in (codebook, weight, bias):
        t.requires_grad_()

    def outcome():
        ids, totals = multiscale_quantize(f, codebook, weight, bias, [0, 0, 0], [(1, 1), (2, 2), (4, 4)])
        return ids, totals, *torch.autograd.grad(totals.square().sum(), (codebook, weight, bias))

    expected = outcome()
    with torch.autocast("cpu", torch.bfloat16):
        actual = outcome()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_scales_that_shrink_are_refused():
    f, codebook, weight = torch.randn(1, 8, 4, 4), torch.randn(50, 8), torch.randn(1, 8, 8, 3, 3)
    for scales in ([(4, 4), (1, 1), (4, 4)], [(2, 3), (3, 2), (4, 4)]):
        with pytest.raises(ValueError, match="want scales coarse to fine, none smaller than the one before"):
            multiscale_quantize(f, codebook, weight, torch.zeros(1, 8), [0, 0, 0], scales)


@pytest.fixture(params=NATIVE)
def native(request):
    with running(request.param):
        yield request.param


def arguments(scales, phi=2, batch=2, dim=5, codes=40, dtype=torch.float32):
    f = torch.randn(batch, dim, *scales[-1])
    codebook = torch.randn(codes, dim) * torch.rand(codes, 1).add(0.2)
    weight, bias = torch.randn(phi, dim, dim, 3, 3) / (3 * dim) ** 0.5, torch.randn(phi, dim) / 6
    return *(t.to(dtype) for t in (f, codebook, weight, bias)), [k % phi for k in range(len(scales))]


def expected(f, codebook, weight, bias, which, scales, metric, ratio, keep=None):
    phis = list(zip(weight.double(), bias.double(), strict=True))
    f, codebook = f.double(), codebook.double()
    return reference_var.quantize(
        f, codebook, phis, which, list(scales), metric=metric, ratio=ratio, beta=0.0, keep=keep
    )


def sums_of(ids, codebook, weight, bias, which, scales, ratio=0.5):
    """Plain PyTorch's running sums of given tokens, in the dtype of the weights."""
    parts = ids.split([h * w for h, w in scales], dim=1)
    each = [
        dequantize_scale(part, codebook, weight[q], bias[q], scale, scales[-1], ratio)
        for part, q, scale in zip(parts, which, scales, strict=True)
    ]
    return torch.stack(list(accumulate(each)))


def assert_as_accurate(totals, ids, codebook, weight, bias, which, scales):
    """At most twice as far from float64 as plain PyTorch is."""
    weights = codebook, weight, bias
    exact = sums_of(ids, *(t.double() for t in weights), which, scales)
    allowed = 2 * (sums_of(ids, *weights, which, scales).double() - exact).abs().amax((1, 2, 3, 4))
    assert ((totals.double() - exact).abs().amax((1, 2, 3, 4)) <= allowed + 1e-9).all()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scales", SCHEDULES, ids=str)
def test_tokens_and_running_sums_are_the_references(implementation, scales, metric, ratio):
    args = arguments(scales)
    ids, totals = multiscale_quantize(*args, scales, metric=metric, ratio=ratio)
    wanted, _, _, running = expected(*args, scales, metric, ratio)
    assert ids.dtype == torch.int64
    assert totals.is_contiguous()
    assert torch.equal(ids, wanted)
    assert_close(totals.double(), torch.stack(running), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 7, 16, 33, 70])
@pytest.mark.parametrize("phi", [1, 4])
def test_any_number_of_channels(implementation, dim, phi):
    scales = SCHEDULES[3]
    args = arguments(scales, phi, dim=dim, codes=90)
    ids, totals = multiscale_quantize(*args, scales)
    wanted, _, _, running = expected(*args, scales, "l2", 0.5)
    assert torch.equal(ids, wanted)
    assert_close(totals.double(), torch.stack(running), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scales", "dim", "metric", "keep"),
    [
        (((5, 3),), 3, "l2", None),
        (((2, 1), (3, 2), (4, 3)), 5, "cosine", [3, 1]),
        (((1, 1), (2, 2)), 33, "l2", [0, 2]),  # three blocks of channels
        (((1, 1), (1, 17), (1, 19)), 2, "l2", None),  # windows of columns
        (((1, 34), (1, 35)), 18, "cosine", [2, 1]),
    ],
    ids=str,
)
@needs_triton
def test_triton_is_the_reference(scales, dim, metric, keep):
    args = arguments(scales, dim=dim)
    with running("triton"):
        ids, totals = multiscale_quantize(
            *args, scales, metric=metric, keep=None if keep is None else torch.tensor(keep)
        )
    wanted, _, _, sums = expected(*args, scales, metric, 0.5, keep)
    assert torch.equal(ids, wanted)
    assert_close(totals.double(), torch.stack(sums), rtol=1e-5, atol=1e-5)
    if keep is None:
        assert_as_accurate(totals, ids, *args[1:], scales)


@needs_triton
def test_triton_takes_an_empty_batch_and_reads_strided_maps_without_changing_them():
    scales = ((1, 2), (2, 3))
    f, *rest = arguments(scales, dim=3)
    strided = f.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    before = strided.clone()
    with running("triton"):
        expected = multiscale_quantize(f, *rest, scales)
        actual = multiscale_quantize(strided, *rest, scales)
        ids, totals = multiscale_quantize(f[:0], *rest, scales)
    assert torch.equal(strided, before)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert ids.shape == (0, 8)
    assert totals.shape == (2, 0, 3, 2, 3)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_tokens_of_ten_scales_are_nearest_all_along_and_the_sums_as_accurate_as_pytorchs(native, metric):
    config = preset("paper").tokenizer
    scales, disagreements = config.scales, 0
    for seed in range(3):
        torch.manual_seed(seed)
        *args, _ = arguments(scales, phi=4, batch=2, dim=32, codes=1500)
        args = [*args, phi_index(len(scales), 4)]
        ids, totals = multiscale_quantize(*args, scales, metric=metric)
        with kernels.use("reference"):
            disagreements += (ids != multiscale_quantize(*args, scales, metric=metric)[0]).any(1).sum()
        assert_as_accurate(totals, ids, *args[1:], scales)
        f, codebook = args[0].double(), args[1].double()
        sums = [torch.zeros_like(f), *sums_of(ids, codebook, *(t.double() for t in args[2:4]), args[4], scales)]
        if metric == "cosine":
            codebook = F.normalize(codebook, dim=1)
        for k, scale in enumerate(scales):
            rows = area_downsample(f - sums[k], scale).permute(0, 2, 3, 1).reshape(-1, 32)
            cost = (codebook.square().sum(1) / 2 if metric == "l2" else 0) - rows @ codebook.T
            start = sum(h * w for h, w in scales[:k])
            chosen = cost.gather(1, ids[:, start : start + scale[0] * scale[1]].reshape(-1, 1))[:, 0]
            assert (chosen - cost.min(1).values <= 2e-5).all()
    assert disagreements <= 1  # of 6 samples: a near-tie changes all that follows


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("level", NATIVE)
def test_numbers_depend_neither_on_the_threads_nor_on_the_batch(level, batch):
    scales = ((1, 2), (3, 4), (5, 7), (5, 9))
    f, *rest = arguments(scales, batch=batch, dim=19, codes=1100)
    before = torch.get_num_threads()
    try:
        with running(level):
            torch.set_num_threads(1)
            ids, totals = multiscale_quantize(f, *rest, scales)
            torch.set_num_threads(2)
            both = multiscale_quantize(f, *rest, scales)
            for b in range(batch):
                one, sums = multiscale_quantize(f[b : b + 1], *rest, scales)
                assert torch.equal(one, ids[b : b + 1])
                assert torch.equal(sums, totals[:, b : b + 1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(both[0], ids)
    assert torch.equal(both[1], totals)


def test_vector_instruction_sets_agree_bit_by_bit():
    if not {"avx2", "avx512"} <= set(_native.levels() if NATIVE else []):
        pytest.skip("this processor has no AVX-512")
    scales = SCHEDULES[3]
    args = arguments(scales, dim=13)
    with running("native avx2"):
        ids, totals = multiscale_quantize(*args, scales)
    with running("native avx512"):
        others = multiscale_quantize(*args, scales)
    assert torch.equal(ids, others[0])
    assert torch.equal(totals, others[1])


def test_samples_are_independent(implementation):
    scales = SCHEDULES[3]
    f, *rest = arguments(scales, batch=3)
    ids, totals = multiscale_quantize(f, *rest, scales)
    for b in range(3):
        one, sums = multiscale_quantize(f[b : b + 1], *rest, scales)
        assert torch.equal(one, ids[b : b + 1])
        assert_close(sums, totals[:, b : b + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_what_is_not_kept_is_left_out_of_the_sums_only(implementation, dtype):
    scales = SCHEDULES[2]
    args = arguments(scales, batch=5)
    keep = [4, 1, 0, 2, 3]
    ids, totals = multiscale_quantize(*args, scales, metric="l2", keep=torch.tensor(keep, dtype=dtype))
    full, every = multiscale_quantize(*args, scales, metric="l2")
    assert torch.equal(ids, full)
    for b, n in enumerate(keep):
        for k in range(len(scales)):
            assert torch.equal(totals[k, b], every[min(k, n - 1), b] if n else torch.zeros_like(every[0, b]))


def test_scale_ids_run_row_by_row():
    codebook = torch.eye(6) * 3
    ids = torch.tensor([[0, 1, 2, 3, 4, 5]])
    still = torch.zeros(6, 6, 3, 3), torch.zeros(6)
    h = dequantize_scale(ids, codebook, *still, (2, 3), (2, 3), 0.0)
    assert torch.equal(h[0].argmax(0), torch.tensor([[0, 1, 2], [3, 4, 5]]))


@pytest.mark.parametrize(("size", "out"), [(1, 1), (1, 5), (2, 3), (3, 16), (4, 4), (13, 16), (17, 64)])
def test_bicubic_matrices_are_pytorchs_resizing(size, out):
    columns = F.interpolate(torch.eye(size).double()[None, None], size=(out, size), mode="bicubic")[0, 0]
    assert_close(torch.tensor(bicubic_matrix(size, out), dtype=torch.float64), columns, rtol=0, atol=1e-14)


def gradients(value, *weights):
    return torch.autograd.grad(value, weights, allow_unused=True)


@pytest.mark.parametrize("keep", [None, [4, 1, 3]])
@pytest.mark.parametrize("which", [[0, 0, 0, 0], [0, 1, 0, 1], [2, 0, 1, 3], [3, 3, 1, 1]], ids=str)
def test_gradients_of_the_sums_are_the_references(implementation, which, keep):
    scales = SCHEDULES[3]
    f, *weights, _ = arguments(scales, phi=4, batch=3)
    weights = [w.requires_grad_() for w in weights]
    exact = [w.detach().double().requires_grad_() for w in weights]
    factors = torch.randn(len(scales), len(f), *f.shape[1:])
    kept = None if keep is None else torch.tensor(keep)
    ids, totals = multiscale_quantize(f.requires_grad_(), *weights, which, scales, metric="l2", keep=kept)
    assert not ids.requires_grad
    got = gradients((totals * factors).sum(), f, *weights)
    *_, running = expected(f.detach(), *exact, which, scales, "l2", 0.5, keep)
    wanted = gradients((torch.stack(running) * factors.double()).sum(), *exact)
    assert got[0] is None  # only the values of f are used
    for a, b in zip(got[1:], wanted, strict=True):
        assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_gradients_are_as_accurate_as_pytorchs():
    config = preset("notes").tokenizer
    scales = config.scales
    f, *weights, _ = arguments(scales, phi=4, batch=4, dim=32, codes=300)
    which = phi_index(len(scales), 4)
    weights = [w.requires_grad_() for w in weights]
    factors = torch.randn(len(scales), *f.shape)
    ids, totals = multiscale_quantize(f, *weights, which, scales)
    found = gradients((totals * factors).sum(), *weights)
    eager = gradients((sums_of(ids, *weights, which, scales) * factors).sum(), *weights)
    exact = [w.detach().double().requires_grad_() for w in weights]
    exact_grads = gradients((sums_of(ids, *exact, which, scales) * factors.double()).sum(), *exact)
    for a, b, c in zip(found, eager, exact_grads, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm()
    again = gradients((multiscale_quantize(f, *weights, which, scales)[1] * factors).sum(), *weights)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


def test_gradcheck():
    scales = ((1, 2), (2, 2), (3, 4))
    f, *weights, which = arguments(scales, batch=2, dim=2, codes=4, dtype=torch.float64)
    weights = [w.requires_grad_() for w in weights]
    keep = torch.tensor([3, 2])

    def sums(*weights):
        return multiscale_quantize(f, *weights, which, scales, keep=keep)[1]

    assert sums(*weights).dtype == torch.float64
    assert torch.autograd.gradcheck(sums, weights)
    assert torch.autograd.gradgradcheck(sums, weights)


def test_double_precision_is_the_references():
    scales = SCHEDULES[3]
    args = arguments(scales, dtype=torch.float64)
    ids, totals = multiscale_quantize(*args, scales)
    wanted, _, _, running = expected(*args, scales, "l2", 0.5)
    assert torch.equal(ids, wanted)
    assert_close(totals, torch.stack(running), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep", [None, [2, 0]])
def test_the_operator_is_well_formed(keep):
    scales = ((1, 2), (2, 3))
    f, *weights, which = arguments(scales, dim=3)
    weights = [w.requires_grad_() for w in weights]
    flat = [size for scale in scales for size in scale]
    kept = None if keep is None else torch.tensor(keep)
    torch.library.opcheck(op._quantize, (f, *weights, which, flat, "l2", 0.5, kept))
    torch.library.opcheck(op._shifted, (f, flat))


def test_compiles_as_one_graph():
    scales = SCHEDULES[3]
    f, *weights, which = arguments(scales)
    weights = [w.requires_grad_() for w in weights]
    keep = torch.tensor([2, 4])

    def loss(f, *weights):
        ids, totals = multiscale_quantize(f, *weights, which, scales, metric="cosine", keep=keep)
        return ids, totals.square().mean()

    ids, value = torch.compile(loss, fullgraph=True)(f, *weights)
    expected, eager = loss(f, *weights)
    assert torch.equal(ids, expected)
    assert_close(value, eager)
    for a, b in zip(gradients(value, *weights), gradients(eager, *weights), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_empty_batch_gives_no_tokens(implementation):
    scales = SCHEDULES[3]
    f, *weights, which = arguments(scales, batch=0)
    weights = [w.requires_grad_() for w in weights]
    ids, totals = multiscale_quantize(f, *weights, which, scales, keep=torch.zeros(0, dtype=torch.int64))
    assert ids.shape == (0, sum(h * w for h, w in scales))
    assert totals.shape == (len(scales), *f.shape)
    assert not any(g.any() for g in gradients(totals.sum(), *weights))


def test_strided_maps_and_weights_are_read_as_their_values(implementation):
    scales = SCHEDULES[3]
    f, codebook, weight, bias, which = arguments(scales)
    strided = f.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    others = codebook.T.contiguous().T, weight.transpose(1, 4).contiguous().transpose(1, 4), bias.T.contiguous().T
    assert not any(t.is_contiguous() for t in (strided, *others))
    before = strided.clone()
    found = multiscale_quantize(strided, *others, which, scales)
    assert torch.equal(strided, before)
    for a, b in zip(found, multiscale_quantize(f, codebook, weight, bias, which, scales), strict=True):
        assert_close(a, b)


def test_cells_that_are_not_finite_make_the_rows_that_they_touch_index_0(implementation):
    scales = ((2, 2), (3, 3), (5, 5))
    f, *rest = arguments(scales, batch=3, codes=50)
    clean, sums = multiscale_quantize(f, *rest, scales)
    f[0, 2, 4, 1] = float("nan")
    f[1, 0, 0, 0] = float("-inf")
    ids, totals = multiscale_quantize(f, *rest, scales)
    touched = torch.cat([area_downsample(f, scale).isfinite().all(1).logical_not().flatten(1) for scale in scales], 1)
    assert touched.any(1).tolist() == [True, True, False]
    assert not touched.all()
    assert not ids[touched].any()
    assert ids[~touched].any()
    assert totals.isfinite().all()
    assert torch.equal(ids[2], clean[2])
    assert_close(totals[:, 2], sums[:, 2])


def test_extreme_values_stay_those_of_the_reference(implementation):
    scales = SCHEDULES[3]
    f, codebook, *rest = arguments(scales)
    for size in (1e-18, 1e12):
        ids, totals = multiscale_quantize(f * size, codebook * size, rest[0], rest[1] * size, rest[2], scales)
        wanted, _, _, running = expected(f * size, codebook * size, rest[0], rest[1] * size, rest[2], scales, "l2", 0.5)
        assert torch.equal(ids, wanted)
        assert_close(totals.double() / size, torch.stack(running) / size, rtol=1e-5, atol=1e-5)


def test_of_equal_codes_the_first_is_chosen(implementation):
    scales = SCHEDULES[3]
    f, codebook, *rest = arguments(scales)
    codebook[1::2] = codebook[::2]
    ids, _ = multiscale_quantize(f, codebook, *rest, scales)
    assert not (ids % 2).any()
    assert len(ids.unique()) > 5


FIT = {
    "f": torch.zeros(2, 3, 4, 4),
    "codebook": torch.zeros(8, 3),
    "weight": torch.zeros(2, 3, 3, 3, 3),
    "bias": torch.zeros(2, 3),
    "phi_index": [0, 1],
    "scales": ((1, 1), (4, 4)),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"f": torch.zeros(3, 4, 4)}, r"want f \(B, D, H, W\) .* got \(3, 4, 4\), \(8, 3\)"),
        ({"codebook": torch.zeros(8, 2)}, r"codebook \(V, D\), .* got \(2, 3, 4, 4\), \(8, 2\)"),
        ({"codebook": torch.zeros(0, 3)}, r"D and V at least 1; got \(2, 3, 4, 4\), \(0, 3\)"),
        ({"f": torch.zeros(2, 0, 4, 4), "codebook": torch.zeros(8, 0)}, "D and V at least 1"),
        ({"weight": torch.zeros(2, 3, 3, 5, 5)}, r"want weight \(Q, 3, 3, 3, 3\) .* got \(2, 3, 3, 5, 5\), \(2, 3\)"),
        ({"bias": torch.zeros(3)}, r"bias \(Q, 3\); got .* \(3,\)"),
        ({"bias": torch.zeros(1, 3)}, r"bias \(Q, 3\); got .* \(1, 3\)"),
        ({"f": torch.zeros(2, 3, 4, 4).bfloat16()}, "all float32 or all float64; got torch.bfloat16, torch.float32"),
        ({"weight": FIT["weight"].double()}, "got torch.float32, torch.float32, torch.float64, torch.float32"),
        ({"codebook": torch.zeros(8, 3, device="meta")}, "want all tensors on f's device, cpu"),
        ({"scales": ((1, 1), (4, 5))}, r"must be f's grid \(4, 4\)"),
        ({"scales": (), "phi_index": []}, r"the last of the scales \(\) must be f's grid"),
        ({"phi_index": [0]}, "one entry per scale, got 1"),
        ({"scales": ((1, 5), (4, 4))}, r"want scales within \(1, 1\)\.\.\(4, 4\).* got \(\(1, 5\), \(4, 4\)\)"),
        ({"scales": ((0, 1), (4, 4))}, r"want scales within \(1, 1\)\.\.\(4, 4\)"),
        ({"phi_index": [0, 2]}, r"want phi_index in 0\.\.1, got \[0, 2\]"),
        ({"phi_index": [-1, 0]}, r"want phi_index in 0\.\.1, got \[-1, 0\]"),
        ({"metric": "dot"}, "metric must be l2 or cosine, got 'dot'"),
        ({"keep": torch.tensor([1])}, r"want keep \(2,\) of integers, got \(1,\)"),
        ({"keep": torch.tensor([1.0, 2.0])}, r"want keep \(2,\) of integers, got \(2,\) of torch.float32"),
        ({"keep": torch.tensor([True, False])}, r"want keep \(2,\) of integers, got \(2,\) of torch.bool"),
        ({"keep": torch.tensor([1, 3])}, r"want keep in 0\.\.2, got \[1, 3\]"),
        ({"keep": torch.tensor([-1, 2])}, r"want keep in 0\.\.2, got \[-1, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    multiscale_quantize(**FIT)
    with pytest.raises(ValueError, match=message):
        multiscale_quantize(**FIT | change)


def test_the_folded_convolution_is_the_mix():
    f, _, weight, bias, _ = arguments(((4, 5),), phi=1, dtype=torch.float64)
    taps = reference.fold(weight, 0.3)[0].permute(3, 2, 0, 1)
    mixed = torch.lerp(f, F.conv2d(f, weight[0], bias[0], padding=1), 0.3)
    assert_close(F.conv2d(f, taps, 0.3 * bias[0], padding=1), mixed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("scale", "grid"), [((1, 1), (4, 6)), ((3, 2), (5, 7)), ((4, 6), (4, 6))])
def test_area_downsampling_averages_what_a_cell_touches(scale, grid):
    x = torch.randn(2, 3, *grid, dtype=torch.float64, requires_grad=True)
    assert_close(area_downsample(x, scale), reference_var.resize(x, scale, reference_var.area_matrix))
    assert torch.autograd.gradcheck(lambda x: area_downsample(x, scale), x)
