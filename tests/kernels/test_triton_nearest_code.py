"""Triton's nearest code, interpreted, against the stated float32 sums: the same index in every case.

The interpreter's own `tl.fma` rounds twice and its `tl.dot` sums in any order. Here the one is exact and the exact
kernel's ieee `tl.dot` is a chain of it, as in the compiled code (test_compiled.py looks at the order). The filter's
products stay the interpreter's: in float32, on operands that it cuts off to bfloat16 where a GPU rounds. They differ
from a GPU's, and the result must not depend on them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mars.kernels import _backend

if (why := _backend.missing("triton", "cpu")) is not None:
    pytest.skip(why, allow_module_level=True)

import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from mars.kernels.nearest_code import packing, triton_packing
from mars.kernels.nearest_code import triton as kernels
from tests.launches import launches as launches_of

# numpy's, where a GPU overflows in silence
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

SEARCHES = {
    "exact": kernels.search_exact,
    "filtered": lambda x, packed: kernels.search_filtered(x, packed, splits=1),
    "split": lambda x, packed: kernels.search_filtered(x, packed, splits=4),
}


def fma(a, b, c):
    """float32 a b + c, rounded once: float64 rounded to odd holds enough for a second rounding to be harmless."""
    with np.errstate(all="ignore"):
        product, c = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)
        total = product + c
        part = total - product
        error = (product - (total - part)) + (c - part)
        even = total.view(np.int64) & 1 == 0
        inexact = even & (error != 0) & np.isfinite(total)
        total = np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)
        return total.astype(np.float32)


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    plain_dot = InterpreterBuilder.create_dot

    def create_fma(self, x, y, z):
        return TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if input_precision != ir.INPUT_PRECISION.IEEE:
            return plain_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        total = d.data
        for k in range(a.data.shape[1]):
            total = fma(a.data[:, k, None], b.data[None, k], total)
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def nearest(x, codebook, biased):
    """The definition."""
    x, codebook = x.numpy(), codebook.numpy()
    with np.errstate(all="ignore"):
        codes = np.where(np.isfinite(codebook).all(1)[:, None], codebook, 0)
        bias = (-0.5 * (codes.astype(np.float64) ** 2).sum(1) * biased).astype(np.float32)
        never = ~np.isfinite(codebook).all(1) | ~np.isfinite(bias)
    codes, bias = np.where(never[:, None], 0, codes), np.where(never, np.float32(-np.inf), bias)
    scores = np.broadcast_to(bias, (len(x), len(codes)))
    for d in range(x.shape[1]):
        scores = fma(x[:, d, None], codes[None, :, d], scores)
    scores = np.where(np.isfinite(x).all(1)[:, None] & ~np.isnan(scores), scores, -np.inf)
    return torch.from_numpy(scores.argmax(1))


def gauss(n, v, d):
    return torch.randn(n, d), torch.randn(v, d)


def unit(n, v, d):
    x, codebook = gauss(n, v, d)
    return x, torch.nn.functional.normalize(codebook, dim=1)


def duplicated(n, v, d):
    x, codebook = gauss(n, v, d)
    return x, codebook[torch.randint(v // 4, (v,))]


def equal(n, v, d):
    x, codebook = gauss(n, v, d)
    return x, codebook[:1].expand(v, d).contiguous()


def outlier(n, v, d):
    x, codebook = gauss(n, v, d)
    codebook[v // 2] *= 1000
    return x, codebook


def log_normal(n, v, d):
    x, codebook = gauss(n, v, d)
    return x, codebook * torch.randn(v, 1).exp()


def shifted(n, v, d):
    x, codebook = gauss(n, v, d)
    return x + 10, codebook + 10


def midpoints(n, v, d):
    """Sums without rounding; a row has 2^d points at one distance, and each is some codes, of whatever length."""
    d = min(d, 3)
    return torch.randint(-2, 2, (n, d)) + 0.5, torch.randint(-2, 3, (v, d)).float()


def broken(n, v, d):
    x, codebook = gauss(n, v, d)
    x[::5, 0], x[1::5, -1], x[2::5, 0] = torch.nan, torch.inf, -torch.inf
    codebook[::3, 0], codebook[1::7, -1], codebook[2::11, 0] = torch.nan, torch.inf, 1e30  # whose square overflows
    return x, codebook


def all_broken(n, v, d):
    x, codebook = gauss(n, v, d)
    return x, codebook / 0


def huge(n, v, d):
    """Products and sums that overflow, to infinities and to NaN."""
    x, codebook = gauss(n, v, d)
    x[::2] *= 1e38 / x[::2].abs().amax(1, keepdim=True)
    return x, codebook * torch.tensor([1.0, 1e3, 1e18])[torch.arange(v) % 3, None]


def tiny(n, v, d):
    x, codebook = gauss(n, v, d)
    return x * torch.tensor([1e-20, 1e-38, 1.0])[torch.arange(n) % 3, None], codebook * 1e-20


def zeros(n, v, d):
    x, codebook = gauss(n, v, d)
    codebook[5:9] = 0
    return torch.zeros_like(x), -codebook


INPUTS = [
    gauss,
    unit,
    duplicated,
    equal,
    outlier,
    log_normal,
    shifted,
    midpoints,
    broken,
    all_broken,
    huge,
    tiny,
    zeros,
]
SHAPES = [(1, 1, 1), (3, 130, 1), (37, 300, 8), (9, 200, 32), (70, 33, 33), (5, 129, 64), (3, 140, 100), (3, 130, 200)]
# N, V, D


@pytest.mark.parametrize("biased", [True, False], ids=["l2", "cosine"])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_finds_the_code_of_the_definition(shape, search, biased):
    x, codebook = gauss(*shape) if biased else unit(*shape)
    ids = SEARCHES[search](x, packing.pack(codebook, biased))
    assert ids.dtype == torch.int64
    assert torch.equal(ids, nearest(x, codebook, biased))


@pytest.mark.parametrize("biased", [True, False], ids=["l2", "cosine"])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("inputs", INPUTS)
def test_finds_the_code_of_the_definition_in(inputs, search, biased):
    x, codebook = inputs(24, 517, 6)
    assert torch.equal(SEARCHES[search](x, packing.pack(codebook, biased)), nearest(x, codebook, biased))


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("inputs", [gauss, duplicated, log_normal, shifted])
def test_more_than_one_block_of_rows(inputs, search):
    x, codebook = inputs(150, 260, 8)
    assert torch.equal(SEARCHES[search](x, packing.pack(codebook, True)), nearest(x, codebook, True))


@pytest.mark.parametrize("search", SEARCHES)
def test_ties_go_to_the_lowest_index_whatever_the_order_of_the_lengths(search):
    x, codebook = torch.zeros(1, 2), torch.tensor([[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert SEARCHES[search](x, packing.pack(codebook, True)).item() == 1
    assert SEARCHES[search](x, packing.pack(codebook, False)).item() == 0  # also of 0 and -0


@pytest.mark.parametrize("search", SEARCHES)
def test_no_rows(search):
    ids = SEARCHES[search](torch.zeros(0, 5), packing.pack(torch.randn(7, 5), True))
    assert ids.shape == (0,)
    assert ids.dtype == torch.int64


def test_ordinary_rows_are_left_to_the_re_rank_and_ties_to_the_exact_kernel(monkeypatch):
    """The count of rows that the filter gives up is what makes it worth its while."""
    listed = []
    exact = kernels._exact

    def spy(x, packed, ids, scratch, rows):
        listed.append(int(scratch[-1]))
        exact(x, packed, ids, scratch, rows)

    monkeypatch.setattr(kernels, "_exact", spy)
    for inputs in (gauss, log_normal, shifted, outlier, equal):
        x, codebook = inputs(64, 2500, 16)
        kernels.search_filtered(x, packing.pack(codebook, True), splits=1)
    *ordinary, ties = listed
    assert max(ordinary) < 16  # of 64, with operands cut off to bfloat16; a few percent where they are rounded
    assert ties == 64


class Launches:
    """Stands in for a kernel: keeps what it is launched with."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.found.append((self.kernel, grid, dict(zip(self.kernel.arg_names, args, strict=False)), constants))
            self.kernel[grid](*args, **constants)

        return launch


@pytest.fixture
def launches(monkeypatch):
    found = []
    for name in ("_filter_kernel", "_rerank_kernel", "_exact_kernel"):
        monkeypatch.setattr(kernels, name, Launches(getattr(kernels, name), found))
    return found


@pytest.mark.parametrize("inputs", [gauss, log_normal, shifted, unit])
def test_the_filters_limits_enclose_the_largest_score(inputs, launches):
    x, codebook = inputs(200, 700, 24)
    packed = packing.pack(codebook, True)
    kernels.search_filtered(x, packed, splits=1)
    filtered = launches[0][2]
    lower, upper = filtered["limits_ptr"][:, 0, 0], filtered["upper_ptr"].amax((1, 2))
    shift, x, codebook = packed.shift[:24].double(), x.double(), codebook.double()
    # Centring takes the same from all scores of a row.
    scores = (x - shift) @ (codebook - shift).T - (codebook - shift).square().sum(1) / 2
    largest = scores.amax(1)
    assert (lower <= largest).all()
    assert (largest <= upper).all()
    e = (upper - lower).double() / 2
    assert (((lower + upper) / 2 - largest).abs() > 0.05 * e).any()  # nor is it beyond all measure
    assert (e <= 2**-6 * (x - shift).norm(dim=1) * (codebook - shift).norm(dim=1).max()).all()


def test_search_takes_the_exact_kernel_for_small_problems_and_the_filter_for_large_ones(monkeypatch):
    taken = []
    monkeypatch.setattr(kernels, "search_exact", lambda x, packed, zeros: taken.append("exact"))
    monkeypatch.setattr(kernels, "search_filtered", lambda x, packed, zeros: taken.append("filtered"))
    packed = packing.pack(torch.randn(4096, 32), True)
    kernels.search(torch.empty(1 << 11, 32), packed)
    kernels.search(torch.empty((1 << 11) + 1, 32), packed)
    kernels.search(torch.empty(1 << 20, 32), packing.pack(torch.randn(2048, 32), True))
    assert taken == ["exact", "filtered", "exact"]


def test_a_search_of_few_rows_is_one_kernel_and_packing_three():
    x, codebook = gauss(2048, 4096, 8)
    packed = packing.pack(codebook, True)
    assert launches_of(lambda: kernels.search(x, packed)) == {"_exact_kernel": 1, "zeros": 1}
    zeros = torch.zeros(kernels.scratch_size(len(x)), dtype=torch.int64)
    assert launches_of(lambda: kernels.search(x, packed, zeros)) == {"_exact_kernel": 1}
    assert launches_of(lambda: triton_packing.pack(codebook, True)).total() == 3


@pytest.mark.parametrize("biased", [True, False], ids=["l2", "cosine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_in_kernels_is_that_of_pytorch(shape, biased):
    """But for bfloat16, which the interpreter cuts off, and the bounds on what that loses."""
    _, codebook = gauss(*shape)
    expected, actual = packing.pack(codebook, biased), triton_packing.pack(codebook, biased)
    for name in ("codes", "bias", "order", "rounded_bias"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    torch.testing.assert_close(actual.shift, expected.shift)
    cut = (actual.rounded.float() - expected.rounded.float()).abs()
    assert (cut <= 2**-7 * expected.rounded.float().abs()).all()
    assert (actual.bounds >= expected.bounds * 0.99).all()
    assert (actual.bounds <= expected.bounds * 8).all()


@pytest.mark.parametrize("biased", [True, False], ids=["l2", "cosine"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_finds_the_code_of_the_definition_in_what_the_kernels_packed(inputs, biased):
    x, codebook = inputs(24, 517, 6)
    packed = triton_packing.pack(codebook, biased)
    assert torch.equal(SEARCHES["split"](x, packed), nearest(x, codebook, biased))


def test_very_large_codebooks_are_sorted(monkeypatch):
    monkeypatch.setattr(triton_packing, "MOST", 100)
    _, codebook = gauss(1, 130, 8)
    assert "_place_kernel" not in launches_of(lambda: triton_packing.pack(codebook, True))
    assert "_place_kernel" in launches_of(lambda: triton_packing.pack(codebook[:100], True))


@pytest.mark.parametrize(
    ("blocks", "tiles", "splits"), [(1, 1, 1), (1, 128, 16), (1, 15, 2), (100, 128, 2), (512, 128, 1)]
)
def test_small_batches_share_the_codes_among_programs(blocks, tiles, splits):
    assert kernels._splits(blocks, tiles) == splits


def launch_far(launch, monkeypatch, *, axis, programs, shifts, **changed):
    """Launch once more, as programs `programs` further on an axis, on tensors `shifts[name]` elements further on."""
    kernel, grid, args, constants = launch
    args = args | changed
    program_id, convert = InterpreterBuilder.create_get_program_id, interpreter._implicit_cvt
    moved = {args[name].data_ptr(): elements * args[name].element_size() for name, elements in shifts.items()}

    def far_program_id(self, asked):
        handle = program_id(self, asked)
        return TensorHandle(handle.data + np.int32(programs), handle.dtype) if asked == axis else handle

    def far_pointer(arg):
        converted = convert(arg)
        if isinstance(arg, torch.Tensor) and arg.data_ptr() in moved:
            converted.handle.data = converted.handle.data - np.uint64(moved[arg.data_ptr()])
        return converted

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_get_program_id", far_program_id)
        patch.setattr(interpreter, "_implicit_cvt", far_pointer)
        kernel[grid](*args.values(), **constants)
    return args


def fresh(launch, *names):
    return {name: torch.full_like(launch[2][name], -7) for name in names}


def test_row_offsets_beyond_32_bits(launches, monkeypatch):
    x, codebook = gauss(5, 300, 8)
    packed = packing.pack(codebook, True)
    ids = kernels.search_filtered(x, packed, splits=2)
    kernels.search_exact(x, packed)
    filtering, reranking, listed, exact = launches
    assert not listed[2]["count_ptr"].any()

    far = 1 << 32  # rows
    outputs = {"upper_ptr": 8 * 2 * far, "place_ptr": 8 * 2 * far, "limits_ptr": 2 * 2 * far}
    shifts = {"x_ptr": 8 * far, **outputs}
    again = launch_far(
        filtering, monkeypatch, axis=0, programs=far // 128, shifts=shifts, N=far + 5, **fresh(filtering, *outputs)
    )
    assert all(torch.equal(again[name], filtering[2][name]) for name in outputs)

    far = 1 << 31
    shifts = {"x_ptr": 8 * far, "upper_ptr": 16 * far, "place_ptr": 16 * far, "limits_ptr": 4 * far, "ids_ptr": far}
    again = launch_far(
        reranking, monkeypatch, axis=0, programs=far // 4, shifts=shifts, N=far + 5, **fresh(reranking, "ids_ptr")
    )
    assert torch.equal(again["ids_ptr"], ids)

    chunks = exact[2]["chunks"]
    far = 1 << 32
    shifts = {"x_ptr": 8 * far, "ids_ptr": far, "key_ptr": far, "done_ptr": far // 64}
    changed = {"key_ptr": torch.zeros(5, dtype=torch.int64), "done_ptr": torch.zeros(1, dtype=torch.int64)}
    again = launch_far(
        exact,
        monkeypatch,
        axis=0,
        programs=far // 64 * chunks,
        shifts=shifts,
        N=far + 5,
        **changed,
        **fresh(exact, "ids_ptr"),
    )
    assert torch.equal(again["ids_ptr"], ids)


def test_code_offsets_beyond_32_bits(launches, monkeypatch):
    x, codebook = gauss(5, 500, 8)
    packed = packing.pack(codebook, True)
    ids = kernels.search_filtered(x, packed, splits=4)  # of a tile each
    kernels.search_exact(x, packed)
    filtering, reranking, listed, exact = launches
    assert not listed[2]["count_ptr"].any()

    far = 1 << 24  # tiles, of 128 codes
    outputs = {"upper_ptr": 8 * far, "place_ptr": 8 * far, "limits_ptr": 2 * far}
    shifts = {"codes_ptr": 128 * 16 * far, "bias_ptr": 128 * far, "bounds_ptr": 8 * far, **outputs}
    again = launch_far(
        filtering, monkeypatch, axis=1, programs=far, shifts=shifts, tiles=far + 4, **fresh(filtering, *outputs)
    )
    used = again["upper_ptr"] > -torch.inf
    assert used.any()
    assert torch.equal(again["upper_ptr"], filtering[2]["upper_ptr"])
    assert torch.equal((again["place_ptr"] - far)[used], filtering[2]["place_ptr"][used])

    shifts = {"codes_ptr": 128 * 8 * far, "bias_ptr": 128 * far, "order_ptr": 128 * far}
    again = launch_far(
        reranking,
        monkeypatch,
        axis=0,
        programs=0,
        shifts=shifts,
        place_ptr=reranking[2]["place_ptr"] + far,
        **fresh(reranking, "ids_ptr"),
    )
    assert torch.equal(again["ids_ptr"], ids)

    each, chunks = exact[2]["tiles_each"], exact[2]["chunks"]
    far = (1 << 25) // each
    codes = 64 * each * far
    again = launch_far(
        exact,
        monkeypatch,
        axis=0,
        programs=far,
        shifts={"codes_ptr": 8 * codes, "bias_ptr": codes, "order_ptr": codes},
        tiles=exact[2]["tiles"] + each * far,
        chunks=chunks + far,
        key_ptr=torch.zeros(5, dtype=torch.int64),
        done_ptr=torch.full((1,), far),
        **fresh(exact, "ids_ptr"),
    )
    assert torch.equal(again["ids_ptr"], ids)


@triton.jit
def _keys(score_ptr, code_ptr, key_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(key_ptr + i, kernels._key(tl.load(score_ptr + i), tl.load(code_ptr + i)))


def test_keys_are_ordered_by_score_then_by_lowest_code():
    scores = [-np.inf, -3.4e38, -2.0, -1e-40, -0.0, 0.0, 1e-40, 1.5, 3.4e38, np.inf]
    last = 2**31 - 1
    pairs = [(s, c) for s in scores for c in (last, last - 1, 7, 0)]
    score = torch.tensor([s for s, _ in pairs])
    key = torch.zeros(64, dtype=torch.int64)
    code = torch.tensor([c for _, c in pairs], dtype=torch.int32)
    pad = torch.nn.functional.pad
    _keys[(1,)](pad(score, (0, 24)), pad(code, (0, 24)), key, SIZE=64)
    key = key[:40].view(10, 4)
    assert (key > 0).all()  # above what the memory starts at
    assert (key.diff(dim=1) > 0).all()
    assert torch.equal(key[4], key[5])  # -0 and 0
    assert (key[[0, 1, 2, 3, 4, 6, 7, 8, 9]].flatten().diff() > 0).all()
    assert torch.equal(key & last ^ last, code.view(10, 4).long())
