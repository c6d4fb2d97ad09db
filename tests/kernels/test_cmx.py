"""Channel multiplexing is a permutation: everything here is compared bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mars.kernels import cmx, inverse_cmx

DTYPES = [
    torch.bool,
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    ),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
]


def any_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of arbitrary bit patterns, NaNs and negative zeros among them."""
    generator = torch.Generator().manual_seed(0)
    size = torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, high, (math.prod(shape) * size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_bytes = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


@given(
    lead=st.lists(st.integers(0, 3), max_size=3),
    factors=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=100, deadline=None)
def test_round_trip_is_exact(lead, factors, size, dtype):
    x = any_bits((*lead, size[0] * factors[0], size[1] * factors[1]), dtype)
    y = cmx(x, factors)
    assert y.shape == (*lead, factors[0] * factors[1], *size)
    assert y.is_contiguous()
    assert same_bits(inverse_cmx(y, factors), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_survives(dtype):
    x = any_bits((2, 6, 6), dtype)
    assert same_bits(inverse_cmx(cmx(x, (2, 3)), (2, 3)), x)


@pytest.mark.parametrize("factors", [(1, 1), (2, 1), (1, 3), (2, 3), (4, 2)], ids=str)
def test_channel_order_is_the_documented_one(factors):
    r_f, r_t = factors
    x = torch.arange(8 * 6).reshape(8, 6)
    y = cmx(x, factors)
    for i_f in range(r_f):
        for i_t in range(r_t):
            assert torch.equal(y[i_f * r_t + i_t], x[i_f::r_f, i_t::r_t])


@pytest.mark.parametrize("r", [1, 2, 3])
def test_square_factors_agree_with_pixel_unshuffle(r):
    x = torch.randn(2, 1, 6, 12)
    y = cmx(x[:, 0], (r, r))
    assert torch.equal(y, torch.nn.functional.pixel_unshuffle(x, r))
    assert torch.equal(inverse_cmx(y, (r, r)), torch.nn.functional.pixel_shuffle(y, r)[:, 0])


def test_strided_inputs_are_read_as_their_values():
    x = torch.randn(6, 3, 8, 2).permute(3, 1, 2, 0)[..., ::1, :]
    assert not x.is_contiguous()
    y = cmx(x, (2, 3))
    assert torch.equal(y, cmx(x.contiguous(), (2, 3)))
    assert torch.equal(inverse_cmx(y.transpose(0, 1), (2, 3)), x.transpose(0, 1))


def test_gradient_is_the_inverse_permutation():
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    y = cmx(x, (2, 3))
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(got, inverse_cmx(grad, (2, 3)))
    assert torch.autograd.gradcheck(lambda x: cmx(x, (2, 3)), x)
    assert torch.autograd.gradcheck(lambda y: inverse_cmx(y, (2, 3)), y.detach().requires_grad_())


def test_compiles_as_one_graph():
    compiled = torch.compile(lambda x: inverse_cmx(cmx(x, (2, 3)) + 1, (2, 3)), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 6)
    assert torch.equal(compiled(x), x + 1)


@pytest.mark.parametrize(
    ("shape", "factors", "message"),
    [
        (
            (12, 8),
            (5, 1),
            "r_f=5 does not divide F=12; use one of 1, 2, 3, 4, 6, 12, or pad/crop F to 10 or 15",
        ),
        ((512, 256), (3, 1), "does not divide F=512; .* or pad/crop F to 510 or 513"),
        ((12, 8), (1, 3), "r_t=3 does not divide T=8; use one of 1, 2, 4, 8, or pad/crop T to 6 or 9"),
        ((2, 8), (4, 1), "pad F to 4$"),
        ((12, 8), (0, 1), r"must be 1 or more, got \(0, 1\)"),
        ((12, 8), (2, -1), r"must be 1 or more, got \(2, -1\)"),
        ((12,), (1, 1), r"want x \(..., F, T\), got shape \(12,\)"),
    ],
)
def test_impossible_factors_are_refused_with_what_would_fit(shape, factors, message):
    with pytest.raises(ValueError, match=message):
        cmx(torch.zeros(shape), factors)


def test_inverse_refuses_channels_that_do_not_fit():
    with pytest.raises(ValueError, match=r"want 6 channels, got 4; factors that fit 4: \(1, 4\), \(2, 2\), \(4, 1\)"):
        inverse_cmx(torch.zeros(4, 2, 2), (2, 3))
    with pytest.raises(ValueError, match=r"want x \(..., channels, F, T\)"):
        inverse_cmx(torch.zeros(2, 2), (1, 1))
