"""Nearest code: exactly the index that the contract's float32 arithmetic gives, on every implementation but PyTorch's.

PyTorch's matrix products leave the order of the additions open; the reference is compared by the distance at its index.
"""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F

from mars.kernels import _backend, _native, nearest_code, pack_codebook
from mars.kernels.nearest_code import reference
from tests.implementations import NATIVE, running

METRICS = ["l2", "cosine"]
SHAPES = [
    (1, 1, 2),
    (3, 2, 1),
    (7, 5, 13),
    (65, 3, 63),
    (130, 33, 257),
    (31, 32, 1000),
    (9, 4, 64),
    (97, 33, 1500),  # from 1024 codes on, filters
    (129, 8, 2049),
    (50, 100, 1024),
    (17, 1, 3000),
    (800, 16, 1100),
]
# N, D, V


@pytest.fixture(params=NATIVE)
def native(request):
    with running(request.param):
        yield request.param


@pytest.fixture(params=["reference", *NATIVE])
def implementation(request):
    with running(request.param):
        yield request.param


def scores(x, codebook, metric):
    """(N, V) by the contract: one rounding to float32 after each product and sum, both exact in float64."""
    if metric == "cosine":
        codebook = F.normalize(codebook, dim=-1)
        score = torch.zeros(len(codebook))
    else:
        score = codebook.double().square().sum(1).mul(-0.5).float()
    score = score.expand(len(x), -1)
    for x_d, c_d in zip(x.double().T, codebook.double().T, strict=True):
        score = (score.double() + x_d[:, None] * c_d).float()
    return score


def exact(x, codebook, metric):
    """The index that the contract names; argmax takes the lowest."""
    return scores(x, codebook, metric).argmax(1)


def assert_nearest(ids, x, codebook, metric):
    """No code is nearer than the chosen one by more than float32 rounding of the scores."""
    assert ids.dtype == torch.int64
    assert ids.shape == x.shape[:1]
    x, codebook = x.double(), codebook.double()
    if metric == "l2":
        cost = (x[:, None] - codebook).square().sum(-1)
        size = (x.norm(dim=1) + codebook.norm(dim=1).max()) * codebook.norm(dim=1).max()
    else:
        cost, size = -torch.cosine_similarity(x[:, None], codebook[None], dim=-1, eps=0), 1.0
    chosen = cost.gather(1, ids[:, None])[:, 0]
    assert (chosen - cost.min(1).values <= 1e-6 * size).all()


def inputs(n, d, v):
    return torch.randn(n, d), torch.randn(v, d) * torch.rand(v, 1).add(0.3)


def adversarial(n=150, d=24, v=1700):
    """Codebooks on which a filter's bounds are of no use, unless it is careful."""
    x, codebook = inputs(n, d, v)
    outlier = codebook.clone()
    outlier[5] *= 1e4
    half_equal = codebook.clone()
    half_equal[v // 2 :] = codebook[3]
    grid = torch.randint(-2, 3, codebook.shape).float()
    return {
        "outlier": (x, outlier),
        "log-normal norms": (x, codebook * torch.randn(len(codebook), 1).mul(2).exp()),
        "shifted": (x + 10, codebook + 10),
        "far shifted": (x + 1e4, codebook + 1e4),
        "all equal": (x, codebook[:1].expand(v, -1).contiguous()),
        "half equal": (x, half_equal),
        "all zero": (x, torch.zeros_like(codebook)),
        "ties on a grid": (torch.randint(-1, 2, x.shape).float(), grid),
        "constant rows": (torch.ones_like(x), codebook),
        "zero rows": (torch.zeros_like(x), codebook),
        "rows are codes": (codebook[::11].contiguous(), codebook),
        "one long row": (torch.cat((x, 1e5 * x[:1])), codebook),
        "tiny": (x * 1e-18, codebook * 1e-18),
        "denormal products": (x * 1e-21, codebook * 1e-21),
        "huge": (x * 1e17, codebook * 1e17),
        "overflowing": (x * 1e25, codebook * 1e15),
        "rows overflow a square": (x * 1e30, codebook),
    }


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_is_exact(shape, metric, native):
    x, codebook = inputs(*shape)
    assert torch.equal(nearest_code(x, codebook, metric), exact(x, codebook, metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", adversarial())
def test_native_is_exact_on_adversarial_codebooks(case, metric, native):
    x, codebook = adversarial()[case]
    assert torch.equal(nearest_code(x, codebook, metric), exact(x, codebook, metric))


@pytest.mark.skipif(_backend.missing("triton", "cpu") is not None, reason=str(_backend.missing("triton", "cpu")))
@pytest.mark.parametrize("metric", METRICS)
def test_triton_through_the_op(metric):
    x, codebook = inputs(70, 20, 2500)
    with running("triton"):
        assert_nearest(nearest_code(x, codebook, metric), x, codebook, metric)
        assert pack_codebook(codebook, metric).backend == "triton"
        assert pack_codebook(torch.randn(30, 256)).backend == "triton"
        wide = torch.randn(7, 257), torch.randn(30, 257)
        assert_nearest(nearest_code(*wide, metric), *wide, metric)
        assert pack_codebook(wide[1], metric).backend == "reference"  # more than its registers hold


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_finds_the_nearest(shape, metric):
    x, codebook = inputs(*shape)
    with running("reference"):
        ids = nearest_code(x, codebook, metric)
    assert_nearest(ids, x, codebook, metric)
    assert (ids == exact(x, codebook, metric)).double().mean() > 0.98  # but for ties, which are rare


def test_the_reference_holds_a_slice_of_the_scores_at_a_time(monkeypatch):
    x, codebook = inputs(130, 5, 40)
    whole, rows, addmm = reference.nearest_code(x, codebook, "l2"), [], torch.addmm

    def spy(bias, part, codes):
        rows.append(len(part))
        return addmm(bias, part, codes)

    monkeypatch.setattr(torch, "addmm", spy)
    monkeypatch.setattr(reference, "SCORES", 60 * 40 + 39)
    assert_nearest(reference.nearest_code(x, codebook, "l2"), x, codebook, "l2")
    assert rows == [60, 60, 10]
    monkeypatch.setattr(reference, "SCORES", 1)
    assert (reference.nearest_code(x, codebook, "l2") == whole).double().mean() > 0.98
    assert rows[3:] == [1] * 130


def test_the_default_is_native_and_l2():
    x, codebook = inputs(200, 4, 1050)
    assert torch.equal(nearest_code(x, codebook), exact(x, codebook, "l2"))
    assert not torch.equal(nearest_code(x, codebook), nearest_code(x, codebook, "cosine"))
    assert pack_codebook(codebook).backend == ("native" if NATIVE else "reference")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 49, 300])
def test_threads_do_not_show(n, threads, native):
    x, codebook = inputs(n, 20, 1200)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(nearest_code(x, codebook), exact(x, codebook, "l2"))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("v", [2, 16, 50, 128, 1001])
def test_ties_go_to_the_lowest_index(metric, v, implementation):
    x, part = inputs(67, 8, v)
    codebook = part.repeat(3, 1)
    ids = nearest_code(x, codebook, metric)
    assert ids.max() < v
    assert torch.equal(ids, nearest_code(x, part, metric))
    assert not nearest_code(x, part[:1].expand(9, -1), metric).any()
    assert not nearest_code(x, part[:1].expand(1300, -1), metric).any()


def test_ties_between_different_codes_go_to_the_lowest_index(implementation):
    codebook = torch.tensor([[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert nearest_code(torch.zeros(1, 2), codebook).item() == 1
    assert nearest_code(torch.tensor([[0.0, -0.5]]), codebook).item() == 4
    assert nearest_code(torch.zeros(1, 2), codebook, "cosine").item() == 0  # no direction: all are equal


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("v", [40, 1500])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_get_index_0(bad, v, metric, implementation):
    x, codebook = inputs(33, 6, v)
    expected = nearest_code(x, codebook, metric)
    rows = torch.arange(0, 33, 4)
    x[rows, 2] = bad
    expected[rows] = 0
    assert torch.equal(nearest_code(x, codebook, metric), expected)


@pytest.mark.parametrize("v", [40, 1500])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_codes_that_are_not_finite_are_never_chosen(bad, v, implementation):
    x, codebook = inputs(33, 6, v)
    codebook[::3, 1] = bad  # 1e30: its square is not a float32
    usable = torch.ones(v, dtype=torch.bool)
    usable[::3] = False
    expected = usable.nonzero()[:, 0][nearest_code(x, codebook[usable].contiguous())]
    assert torch.equal(nearest_code(x, codebook), expected)
    codebook[:, 1] = bad
    assert not nearest_code(x, codebook).any()


@pytest.mark.parametrize("metric", METRICS)
def test_strided_inputs_are_read_as_their_values(metric, implementation):
    x, codebook = torch.randn(12, 40).T[::2], torch.randn(36, 1100 * 3).T[:, ::3]
    assert not x.is_contiguous()
    assert not codebook.is_contiguous()
    ids = nearest_code(x, codebook, metric)
    assert_nearest(ids, x, codebook, metric)
    assert torch.equal(ids, nearest_code(x.contiguous(), codebook.contiguous(), metric))


@pytest.mark.parametrize("v", [7, 2000])
def test_an_empty_batch_gives_no_indices(v, implementation):
    ids = nearest_code(torch.zeros(0, 4), torch.randn(v, 4))
    assert ids.shape == (0,)
    assert ids.dtype == torch.int64


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4, 7), (2, 0, 3, 7), (7,)], ids=str)
def test_rows_may_have_any_leading_dimensions(shape, implementation):
    x, codebook = torch.randn(shape), torch.randn(40, 7)
    wanted = nearest_code(x.reshape(-1, 7), codebook).view(shape[:-1])
    for held in (codebook, pack_codebook(codebook)):
        assert torch.equal(nearest_code(x, held), wanted)
    if x.ndim > 2:  # of strides that no view can flatten
        assert torch.equal(nearest_code(x.transpose(0, 1), codebook), wanted.transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_searched_in_float32(dtype, implementation):
    x, codebook = (t.to(dtype) for t in inputs(90, 12, 1200))
    ids = nearest_code(x, codebook)
    assert torch.equal(ids, nearest_code(x.float(), codebook.float()))
    assert_nearest(ids, x, codebook, "l2")


@pytest.mark.parametrize("metric", METRICS)
def test_neither_autocast_nor_the_matmul_precision_lowers_the_search(metric, implementation):
    x, codebook = inputs(3000, 32, 500)
    expected = nearest_code(x, codebook, metric)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # training sets it: bfloat16 products on some CPUs
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(nearest_code(x, codebook, metric), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("metric", METRICS)
def test_a_packed_codebook_gives_the_same_and_keeps_its_values(metric, implementation):
    x, codebook = inputs(70, 9, 1300)
    expected = nearest_code(x, codebook, metric)
    packed = pack_codebook(codebook, metric)
    codebook.zero_()
    for part, ids in zip(x.split(30), expected.split(30), strict=True):
        assert torch.equal(nearest_code(part, packed), ids)
    with pytest.raises(ValueError, match=r"want x \(\.\.\., D\) and codebook \(V, D\); got \(2, 3\), \(1300, 9\)"):
        nearest_code(torch.zeros(2, 3), packed)


def test_copies_of_a_packed_codebook_outlive_it(implementation):
    x, codebook = inputs(40, 9, 1300)
    expected = nearest_code(x, codebook)
    packed = pack_codebook(codebook)
    copies = [copy.copy(packed), copy.deepcopy(packed)]
    del packed
    gc.collect()
    assert all(torch.equal(nearest_code(x, each), expected) for each in copies)
    with pytest.raises(TypeError, match="belongs to its process"):
        pickle.dumps(copies[0])


def test_a_packed_codebook_is_not_compiled():
    packed = pack_codebook(torch.randn(5, 3))
    with pytest.raises(Exception, match="give the codebook"):
        torch.compile(lambda x: nearest_code(x, packed), fullgraph=True, backend="eager")(torch.randn(2, 3))


def test_negated_views_and_default_devices_are_understood(implementation):
    x, codebook = inputs(40, 9, 1300)
    expected = nearest_code(-x, codebook)
    packed = pack_codebook(codebook)
    view = torch._neg_view(x)
    assert torch.equal(nearest_code(view, packed), expected)
    assert torch.equal(nearest_code(view, codebook), expected)
    with torch.device("meta"):
        assert torch.equal(nearest_code(view, packed), expected)


def test_long_rows_are_not_filtered_where_integers_could_overflow(native):
    x, codebook = torch.ones(3, 134_000), torch.ones(1030, 1).repeat(1, 134_000)
    codebook[337] = 1.01
    x[1] = 1.01
    assert nearest_code(x, codebook).tolist() == exact(x, codebook, "l2").tolist()


def test_a_codebook_packed_for_one_level_works_at_another():
    if not NATIVE:
        pytest.skip("no native library")
    x, codebook = inputs(70, 9, 1300)
    for level in _native.levels():
        with _native.use_level(level):
            packed = pack_codebook(codebook)
        assert torch.equal(nearest_code(x, packed), exact(x, codebook, "l2"))


def test_the_op_is_well_formed(implementation):
    x, codebook = inputs(20, 5, 30)
    torch.library.opcheck(torch.ops.mars.nearest_code.default, (x, codebook, "l2"))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_the_op_compiles(compiler):
    x, codebook = inputs(20, 5, 30)
    compiled = torch.compile(lambda a, b: nearest_code(a * 2, b, "cosine") + 1, fullgraph=True, backend=compiler)
    assert torch.equal(compiled(x, codebook), nearest_code(x * 2, codebook, "cosine") + 1)


def test_no_gradient_is_recorded():
    x, codebook = (t.requires_grad_() for t in inputs(5, 3, 4))
    assert not nearest_code(x, codebook).requires_grad


@pytest.mark.parametrize(
    ("x", "codebook"), [((), (4, 3)), ((2, 3), (3,)), ((2, 3), (4, 2)), ((1, 2, 3), (4, 2)), ((3,), (4, 2))]
)
def test_shapes_that_do_not_fit_are_refused(x, codebook):
    with pytest.raises(ValueError, match=r"want x \(\.\.\., D\) and codebook \(V, D\); got"):
        nearest_code(torch.zeros(x), torch.zeros(codebook))


@pytest.mark.parametrize("codebook", [(0, 3), (3, 0)])
def test_empty_codebooks_are_refused(codebook):
    with pytest.raises(ValueError, match=r"1 <= V < 2\*\*31 and D >= 1, got"):
        nearest_code(torch.zeros(2, codebook[1]), torch.zeros(codebook))


def test_a_codebook_of_too_many_rows_is_refused():
    with pytest.raises(ValueError, match=r"V < 2\*\*31"):
        nearest_code(torch.zeros(2, 1), torch.zeros(1, 1).expand(2**31, 1))


def test_integers_and_unknown_metrics_are_refused():
    with pytest.raises(ValueError, match="want x of a floating-point dtype, got torch"):
        nearest_code(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="want a codebook of a floating-point dtype, got torch"):
        nearest_code(torch.zeros(1, 2), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="metric must be one of l2, cosine; got 'dot'"):
        nearest_code(torch.zeros(1, 2), torch.zeros(3, 2), "dot")
    with pytest.raises(ValueError, match="one device; got cpu, meta"):
        nearest_code(torch.zeros(1, 2), torch.zeros(3, 2, device="meta"))
