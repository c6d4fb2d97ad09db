"""Nearest code: compared by the distance at the index in float64, and by the index where ties are made on purpose."""

from __future__ import annotations

import pytest
import torch

from mars.kernels import nearest_code
from mars.kernels.nearest_code import op, reference

METRICS = ["l2", "cosine"]
SHAPES = [
    (1, 1, 2),
    (3, 2, 1),
    (7, 5, 13),
    (65, 3, 63),
    (130, 33, 257),
    (31, 32, 1000),
    (9, 4, 64),
    (40, 7, 128),
    (33, 8, 4096),
]
# N, D, V


def costs(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> torch.Tensor:
    """(N, V) by brute force in float64: squared distance, or minus the cosine."""
    x, codebook = x.double(), codebook.double()
    if metric == "l2":
        return (x[:, None] - codebook).square().sum(-1)
    return -torch.cosine_similarity(x[:, None], codebook[None], dim=-1, eps=0)


def assert_nearest(ids, x, codebook, metric):
    """No code is nearer than the chosen one by more than float32 rounding of the scores."""
    assert ids.dtype == torch.int64
    assert ids.shape == x.shape[:1]
    cost = costs(x, codebook, metric)
    chosen = cost.gather(1, ids[:, None])[:, 0]
    size = 1.0
    if metric == "l2":
        size = (x.double().norm(dim=1) + codebook.double().norm(dim=1).max()) * codebook.double().norm(dim=1).max()
    assert (chosen - cost.min(1).values <= 1e-6 * size).all()


def inputs(n, d, v):
    return torch.randn(n, d), torch.randn(v, d) * torch.rand(v, 1).add(0.3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_finds_the_nearest(shape, metric):
    x, codebook = inputs(*shape)
    ids = nearest_code(x, codebook, metric)
    assert_nearest(ids, x, codebook, metric)
    agree = (ids == costs(x, codebook, metric).argmin(1)).double().mean()
    assert agree > 0.98  # ties apart, which are rare


def test_l2_is_the_default_and_differs_from_cosine():
    x, codebook = inputs(200, 4, 50)
    assert torch.equal(nearest_code(x, codebook), nearest_code(x, codebook, "l2"))
    assert not torch.equal(nearest_code(x, codebook), nearest_code(x, codebook, "cosine"))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("v", [2, 16, 50, 64, 128, 1001])
def test_ties_go_to_the_lowest_index(metric, v):
    x, half = inputs(67, 8, v)
    codebook = torch.cat((half, half, half))
    ids = nearest_code(x, codebook, metric)
    assert ids.max() < v
    assert torch.equal(ids, nearest_code(x, half, metric))
    assert not nearest_code(x, half[:1].expand(9, -1), metric).any()
    assert not nearest_code(x, half[:1].expand(256, -1), metric).any()


def test_ties_between_different_codes_go_to_the_lowest_index():
    codebook = torch.tensor([[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert nearest_code(torch.zeros(1, 2), codebook).item() == 1
    assert nearest_code(torch.tensor([[0.0, -0.5]]), codebook).item() == 4
    assert nearest_code(torch.zeros(1, 2), codebook, "cosine").item() == 0  # no direction: all are equal


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("size", "codes"), [(1e-20, 1), (1e4, 1), (1e4, 1e4), (1, 1e-4), (1, 1e4), (1e6, 1)])
def test_extreme_sizes(metric, size, codes):
    x, codebook = inputs(40, 16, 300)
    x, codebook = x * size, codebook * codes
    assert_nearest(nearest_code(x, codebook, metric), x, codebook, metric)


def test_long_vectors_do_not_drown_the_differences_between_codes():
    x, codebook = inputs(200, 16, 300)
    x *= 1e6
    wanted = costs(x, codebook, "l2").argmin(1)
    assert (nearest_code(x, codebook) == wanted).double().mean() > 0.98


@pytest.mark.parametrize("metric", METRICS)
def test_strided_inputs_are_read_as_their_values(metric):
    x, codebook = torch.randn(12, 40).T[::2], torch.randn(36, 99).T[:, ::3]
    assert not x.is_contiguous()
    assert not codebook.is_contiguous()
    ids = nearest_code(x, codebook, metric)
    assert_nearest(ids, x, codebook, metric)
    assert torch.equal(ids, nearest_code(x.contiguous(), codebook.contiguous(), metric))


@pytest.mark.parametrize("metric", METRICS)
def test_an_empty_batch_gives_no_indices(metric):
    ids = nearest_code(torch.zeros(0, 4), torch.randn(7, 4), metric)
    assert ids.shape == (0,)
    assert ids.dtype == torch.int64


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_searched_in_float32(metric, dtype):
    x, codebook = (t.to(dtype) for t in inputs(90, 12, 200))
    ids = nearest_code(x, codebook, metric)
    assert torch.equal(ids, nearest_code(x.float(), codebook.float(), metric))
    assert_nearest(ids, x, codebook, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_neither_autocast_nor_the_matmul_precision_lowers_the_search(metric):
    x, codebook = inputs(3000, 32, 500)
    wanted = nearest_code(x, codebook, metric)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # training sets it: bfloat16 products on some CPUs
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(nearest_code(x, codebook, metric), wanted)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_definition(shape, metric):
    x, codebook = inputs(*shape)
    ids, wanted = nearest_code(x, codebook, metric), reference.nearest_code(x, codebook, metric)
    assert_nearest(wanted, x, codebook, metric)
    assert (ids == wanted).double().mean() > 0.98


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scores", [1, 50, 149, 1000])
def test_chunks_do_not_show(metric, scores, monkeypatch):
    x, codebook = inputs(101, 8, 50)
    whole = nearest_code(x, codebook, metric)
    sizes = []
    original = op._argmax
    monkeypatch.setattr(op, "_SCORES", scores)
    monkeypatch.setattr(op, "_argmax", lambda scores: sizes.append(len(scores)) or original(scores))
    assert torch.equal(nearest_code(x, codebook, metric), whole)
    assert max(sizes) == max(1, scores // 50)
    assert sum(sizes) == 101


def test_no_gradient_is_recorded():
    x, codebook = (t.requires_grad_() for t in inputs(5, 3, 4))
    assert not nearest_code(x, codebook).requires_grad


@pytest.mark.parametrize(
    ("x", "codebook"), [((3,), (4, 3)), ((2, 3), (3,)), ((2, 3), (4, 2)), ((2, 3), (0, 3)), ((1, 2, 3), (4, 3))]
)
def test_shapes_that_do_not_fit_are_refused(x, codebook):
    with pytest.raises(ValueError, match=r"want x \(N, D\) and codebook \(V, D\); got"):
        nearest_code(torch.zeros(x), torch.zeros(codebook))


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="metric must be l2 or cosine, got 'dot'"):
        nearest_code(torch.zeros(1, 2), torch.zeros(3, 2), "dot")
