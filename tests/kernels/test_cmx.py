"""Channel multiplexing is a permutation, compared bit for bit; the spectrogram in it is compared to float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mars.kernels import _backend, _native, cmx, inverse_cmx, inverse_spectrogram_cmx, spectrogram_cmx, use
from mars.kernels.cmx import reference
from mars.kernels.cmx.layout import batched

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = [
    pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=str(why)))
    for name, device in (("reference", "cpu"), ("native", "cpu"), ("triton", DEVICE))
    for why in [_backend.missing(name, device)]
]
NATIVE = pytest.mark.skipif(_backend.missing("native", "cpu") is not None, reason="no native kernels")
PRODUCT = (10 ** (-52 / 20), 40 / (math.log(10) * 100))  # epsilon and scale of AudioConfig()
NORMALISATIONS = [PRODUCT, (1.0, 20.0), (3e-4, 1.0), (1e-12, 0.05), (1e20, 0.3)]
SIZES = [  # (samples..., bins, frames), factors: whole and ragged tiles of every kernel
    ((2, 3, 32, 64), (8, 4)),
    ((2, 66, 260), (2, 2)),
    ((1, 34, 131), (2, 1)),
    ((1, 5, 7), (1, 1)),
    ((33, 12), (3, 3)),
    ((2, 4, 1040), (4, 8)),
    ((3, 6, 1), (3, 1)),
    ((0, 4, 4), (2, 2)),
]

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


@pytest.fixture(params=IMPLEMENTATIONS)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where to put tensors for the implementation in use."""
    with use(request.param):
        yield DEVICE if request.param == "triton" else "cpu"


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
    factors=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip_is_exact(device, lead, factors, size, dtype):
    x = any_bits((*lead, size[0] * factors[0], size[1] * factors[1]), dtype).to(device)
    y = cmx(x, factors)
    assert y.shape == (*lead, factors[0] * factors[1], *size)
    assert y.is_contiguous()
    assert same_bits(y, reference.cmx(x, factors))
    assert same_bits(inverse_cmx(y, factors), x)


@pytest.mark.parametrize("r_t", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_survives(device, dtype, r_t):
    x = any_bits((2, 6, 5 * r_t), dtype).to(device)
    assert same_bits(cmx(x, (2, r_t)), reference.cmx(x, (2, r_t)))
    assert same_bits(inverse_cmx(cmx(x, (2, r_t)), (2, r_t)), x)


@pytest.mark.parametrize(("shape", "factors"), SIZES, ids=str)
def test_sizes_that_fill_no_tile(device, shape, factors):
    for dtype in (torch.uint8, torch.float32):
        x = any_bits(shape, dtype).to(device)
        assert same_bits(cmx(x, factors), reference.cmx(x, factors))
        assert same_bits(inverse_cmx(cmx(x, factors), factors), x)


@pytest.mark.parametrize("factors", [(1, 1), (2, 1), (1, 3), (2, 3), (4, 2)], ids=str)
def test_channel_order_is_the_documented_one(device, factors):
    r_f, r_t = factors
    x = torch.arange(8 * 6, device=device).reshape(8, 6)
    y = cmx(x, factors)
    for i_f in range(r_f):
        for i_t in range(r_t):
            assert torch.equal(y[i_f * r_t + i_t], x[i_f::r_f, i_t::r_t])


@pytest.mark.parametrize("r", [1, 2, 3])
def test_square_factors_agree_with_pixel_unshuffle(device, r):
    x = torch.randn(2, 1, 6, 12, device=device)
    y = cmx(x[:, 0], (r, r))
    assert torch.equal(y, torch.nn.functional.pixel_unshuffle(x, r))
    assert torch.equal(inverse_cmx(y, (r, r)), torch.nn.functional.pixel_shuffle(y, r)[:, 0])


def test_strided_inputs_are_read_as_their_values(device):
    x = torch.randn(6, 3, 8, 2, device=device).permute(3, 1, 2, 0)
    assert not x.is_contiguous()
    y = cmx(x, (2, 3))
    assert torch.equal(y, cmx(x.contiguous(), (2, 3)))
    assert torch.equal(inverse_cmx(y.transpose(0, 1), (2, 3)), x.transpose(0, 1))


def test_lazy_conjugates_and_negatives_are_read_as_their_values(device):
    z = torch.randn(4, 6, dtype=torch.complex64, device=device)
    for lazy in (z.conj(), z.conj().imag):
        assert torch.equal(inverse_cmx(cmx(lazy, (2, 3)), (2, 3)), lazy.clone())
    conjugate = z.conj().requires_grad_()
    x = spectrogram_cmx(conjugate, (2, 3), *PRODUCT)
    (got,) = torch.autograd.grad(x.sum(), conjugate)
    expected = reference.spectrogram_cmx_backward(torch.ones_like(x), z, (2, 3), *PRODUCT).conj()
    torch.testing.assert_close(got, expected)


def test_gradient_is_the_inverse_permutation(device):
    x = torch.randn(2, 4, 6, dtype=torch.float64, device=device, requires_grad=True)
    y = cmx(x, (2, 3))
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(got, inverse_cmx(grad, (2, 3)))
    x = x.detach()[0, :, :3].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cmx(x, (2, 3)), x)
    assert torch.autograd.gradgradcheck(lambda x: inverse_cmx(cmx(x, (2, 3)) ** 2, (2, 3)), x)


def magnitudes(shape: tuple[int, ...], epsilon: float, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """A spectrum whose normalised log magnitudes cover [-1, 1] and a little more; some are 0."""
    levels = torch.rand(shape, dtype=torch.float64) * 2.05
    moduli = epsilon * torch.expm1(levels**3 / 4.2 / scale)
    moduli[torch.rand(shape) < 0.05] = 0
    return torch.polar(moduli, 7 * torch.rand(shape, dtype=torch.float64)).to(dtype)


def bins_contiguous(z: torch.Tensor) -> torch.Tensor:
    """The same values as the front end has them: bins contiguous, and one left out."""
    padded = torch.nn.functional.pad(z, (0, 0, 1, 0)).mT.contiguous().mT
    return padded[..., 1:, :]


def strided(z: torch.Tensor) -> torch.Tensor:
    """The same values with neither bins nor frames contiguous."""
    return torch.stack([z, z], dim=-1)[..., 0]


def worst(got: torch.Tensor, exact: torch.Tensor, relative: bool = False) -> float:
    error = (got.to(exact.dtype) - exact).abs()
    if relative:
        error = error / exact.abs().clamp_min(torch.finfo(torch.float32).tiny)
    return float(error.max()) if error.numel() else 0.0


@cache
def eager_errors(normalisation: tuple[float, float]) -> tuple[float, float, float]:
    """The largest errors of plain PyTorch in float32: of the spectrogram, its gradient and its inverse."""
    z = magnitudes((64, 256), *normalisation, torch.complex64)
    x, grad = inverse_input((1, 64, 256)), torch.randn(1, 64, 256)
    arguments = (1, 1), *normalisation
    wide = z.to(torch.complex128)
    exact = reference.spectrogram_cmx(wide, *arguments)
    exact_grad = reference.spectrogram_cmx_backward(grad.double(), wide, *arguments)
    exact_inverse = reference.inverse_spectrogram_cmx(x.double(), *arguments, (0, 0))
    return (
        worst(reference.spectrogram_cmx(z, *arguments), exact),
        worst(reference.spectrogram_cmx_backward(grad, z, *arguments), exact_grad, relative=True),
        worst(reference.inverse_spectrogram_cmx(x, *arguments, (0, 0)), exact_inverse, relative=True),
    )


def inverse_input(shape: tuple[int, ...]) -> torch.Tensor:
    """A CMX tensor a little beyond [-1, 1]; many elements are next to silence."""
    x = torch.rand(shape) * 2.1 - 1.05
    return torch.where(x < -0.5, torch.exp(-30 * torch.rand(shape)) - 1, x)


def check_accuracy(z: torch.Tensor, factors: tuple[int, int], normalisation: tuple[float, float]) -> None:
    """Against float64: the spectrogram and its gradient err at most twice as much as plain PyTorch in float32."""
    forward, backward, _ = eager_errors(normalisation)
    limit = reference.limit(*normalisation)
    z[(z.abs() / limit - 1).abs() < 1e-5] = 0  # neither surely clipped nor surely not
    wide = z.to(torch.complex128)
    x = spectrogram_cmx(z.requires_grad_(), factors, *normalisation)
    exact = reference.spectrogram_cmx(wide, factors, *normalisation)
    assert x.shape == exact.shape
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert worst(x.detach(), exact) <= 2 * forward
    grad = torch.randn_like(x)
    (got,) = torch.autograd.grad(x, z, grad)
    exact = reference.spectrogram_cmx_backward(grad.double(), wide, factors, *normalisation)
    assert torch.equal(got == 0, exact == 0)
    assert worst(got, exact, relative=True) <= 2 * backward


def check_inverse_accuracy(x: torch.Tensor, factors: tuple[int, int], normalisation: tuple[float, float]) -> None:
    *_, inverse = eager_errors(normalisation)
    m = inverse_spectrogram_cmx(x, factors, *normalisation, zeros=(1, 2))
    exact = reference.inverse_spectrogram_cmx(x.double(), factors, *normalisation, (1, 2))
    assert m.shape == exact.shape
    assert m.is_contiguous()
    assert torch.equal(m == 0, exact == 0)
    assert worst(m, exact, relative=True) <= 2 * inverse


@pytest.mark.parametrize("layout", [torch.clone, bins_contiguous, strided])
@pytest.mark.parametrize(("shape", "factors"), SIZES, ids=str)
def test_spectrogram_is_as_accurate_as_eager(device, shape, factors, layout):
    check_accuracy(layout(magnitudes(shape, *PRODUCT, torch.complex64).to(device)), factors, PRODUCT)


@pytest.mark.parametrize(("shape", "factors"), SIZES, ids=str)
def test_inverse_is_as_accurate_as_eager(device, shape, factors):
    *lead, bins, frames = shape
    x = inverse_input((*lead, math.prod(factors), bins // factors[0], frames // factors[1])).to(device)
    check_inverse_accuracy(x, factors, PRODUCT)


@pytest.mark.parametrize("normalisation", NORMALISATIONS, ids=str)
def test_every_normalisation_is_as_accurate_as_eager(device, normalisation):
    z = magnitudes((64, 128), *normalisation, torch.complex64).to(device)
    check_accuracy(z.clone(), (2, 2), normalisation)
    check_accuracy(bins_contiguous(z), (2, 2), normalisation)
    check_inverse_accuracy(inverse_input((4, 32, 64)).to(device), (2, 2), normalisation)


def test_the_gradient_is_that_of_the_plain_formula():
    epsilon, scale = PRODUCT
    z = magnitudes((8, 8), epsilon, scale, torch.complex128)
    grad = torch.randn(4, 4, 4, dtype=torch.float64)
    plain = z.clone().requires_grad_()
    x = torch.nn.functional.pixel_unshuffle((scale * torch.log1p(plain.abs() / epsilon) - 1).clamp(max=1)[None], 2)
    got = reference.spectrogram_cmx_backward(grad, z, (2, 2), epsilon, scale)
    torch.testing.assert_close(got, torch.autograd.grad(x, plain, grad)[0])
    y = (2.4 * torch.rand(4, 4, 4, dtype=torch.float64) - 1.2).requires_grad_()
    m = reference.inverse_spectrogram_cmx(y, (2, 2), epsilon, scale, (1, 1))
    grad = torch.randn_like(m)
    got = reference.inverse_spectrogram_cmx_backward(grad, y.detach(), (2, 2), epsilon, scale, (1, 1))
    torch.testing.assert_close(got, torch.autograd.grad(m, y, grad)[0])


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # of NumPy, which interprets Triton
def test_extremes_of_the_spectrum(device):
    inf, nan = math.inf, math.nan
    values = [0, -0.0, 1e-45, 1e-30, 1e30, 3e38, complex(3e38, -3e38), inf, complex(inf, -inf), complex(nan, inf)]
    z = torch.tensor([*values, complex(-inf, nan), nan, complex(0, nan)], dtype=torch.complex64, device=device)
    expected = torch.tensor([-1.0] * 4 + [1.0] * 7 + [nan] * 2, device=device)
    x = spectrogram_cmx(z.expand(2, 1, 13), (1, 1), *PRODUCT)
    assert torch.equal(x.nan_to_num(7), expected.nan_to_num(7).expand(2, 1, 1, 13))
    for normalisation in ((1e-12, 0.05), (1e-25, 0.05), (1e25, 0.3)):
        x = spectrogram_cmx(z[None], (1, 1), *normalisation)
        torch.testing.assert_close(x, reference.spectrogram_cmx(z[None], (1, 1), *normalisation), equal_nan=True)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # of NumPy, which interprets Triton
def test_extremes_of_the_gradient(device):
    values = [0, 1e-37, 1e-30j, complex(1e-19, -1e-19), 1e-3, 1e19j, 1e30, complex(3e38, 3e38), complex(math.inf, 1)]
    z = torch.tensor([values], dtype=torch.complex64, device=device).requires_grad_()
    for epsilon, scale in (PRODUCT, (1e-12, 0.05), (1e25, 0.3)):
        x = spectrogram_cmx(z, (1, 1), epsilon, scale)
        (got,) = torch.autograd.grad(x.sum(), z)
        exact = reference.spectrogram_cmx_backward(
            torch.ones_like(x.double()), z.to(torch.complex128), (1, 1), epsilon, scale
        )
        torch.testing.assert_close(got, exact.to(torch.complex64), rtol=1e-6, atol=0)
        assert got[0, 0] == 0
        assert got[0, -1] == 0
        (got,) = torch.autograd.grad(spectrogram_cmx(z, (1, 1), epsilon, scale), z, torch.full_like(x, math.inf))
        assert got[0, 0] == 0
    if _backend.backend(device) != "reference":  # PyTorch's sgn of a subnormal number is NaN
        z = torch.tensor([[1e-44]], dtype=torch.complex64, device=device).requires_grad_()
        (got,) = torch.autograd.grad(spectrogram_cmx(z, (1, 1), *PRODUCT).sum(), z)
        torch.testing.assert_close(got.real, torch.full_like(got.real, PRODUCT[1] / PRODUCT[0]))
    broken = torch.tensor([[complex(math.nan, 1)]], dtype=torch.complex64, device=device).requires_grad_()
    (got,) = torch.autograd.grad(spectrogram_cmx(broken, (1, 1), *PRODUCT).sum(), broken)
    assert got.isnan().all()


def test_extremes_of_the_inverse(device):
    x = torch.tensor([-math.inf, -3, -1, 1, 3, math.inf, math.nan], device=device).reshape(1, 1, 7)
    m = inverse_spectrogram_cmx(x, (1, 1), *PRODUCT)
    assert torch.equal(m[0, :3], torch.zeros(3, device=device))
    assert torch.equal(m[0, 3:6], m[0, 3].expand(3))
    assert float(m[0, 3]) == pytest.approx(reference.limit(*PRODUCT), rel=2e-6)
    assert m[0, 6].isnan()


def test_an_elements_bits_depend_on_its_value_alone(device):
    values = magnitudes((12,), *PRODUCT, torch.complex64).to(device)
    z = values.repeat(11).reshape(1, 132).expand(24, 132)
    whole = spectrogram_cmx(z, (1, 1), *PRODUCT)
    assert torch.equal(whole, whole[:, :1, :12].repeat(1, 24, 11))
    whole = whole.squeeze(0)
    for layout in (torch.clone, bins_contiguous):
        for factors in ((2, 2), (8, 4), (3, 1), (2, 3)):
            assert torch.equal(spectrogram_cmx(layout(z), factors, *PRODUCT), cmx(whole, factors))
            m = inverse_spectrogram_cmx(cmx(whole, factors), factors, *PRODUCT)
            assert torch.equal(m, m[:1, :12].repeat(24, 11))
        for part in (z[:1, :1], z[3:10, 1:32]):
            start = 0 if len(part) == 1 else 1
            expected = whole[: len(part), start : start + part.shape[1]]
            assert torch.equal(spectrogram_cmx(layout(part), (1, 1), *PRODUCT).squeeze(0), expected)


@NATIVE
@pytest.mark.parametrize("level", [] if NATIVE.args[0] else _native.levels())
def test_native_at_every_level_and_number_of_threads(level):
    z, y = magnitudes((5, 66, 134), *PRODUCT, torch.complex64), inverse_input((5, 4, 33, 67))
    threads, results = torch.get_num_threads(), []
    try:
        with use("native"), _native.use_level(level):
            for layout in (torch.clone, bins_contiguous):
                check_accuracy(layout(z), (2, 2), PRODUCT)
                check_inverse_accuracy(y, (2, 2), PRODUCT)
                for count in (1, 2):
                    torch.set_num_threads(count)
                    spectrum = layout(z).requires_grad_()
                    x = spectrogram_cmx(spectrum, (2, 2), *PRODUCT)
                    m = inverse_spectrogram_cmx(y, (2, 2), *PRODUCT)
                    results.append([x, m, *torch.autograd.grad(x, spectrum, y), cmx(m, (3, 2)), inverse_cmx(y, (2, 2))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    *_, m, _, multiplexed, permuted = results[0]
    assert torch.equal(multiplexed, reference.cmx(m, (3, 2)))
    assert torch.equal(permuted, reference.inverse_cmx(y, (2, 2)))


def test_the_front_ends_spectrum_is_not_copied():
    z = torch.fft.rfft(torch.randn(2, 3, 10, 64)).mT[..., 1:, :]
    for spectrum in (z, z.contiguous()):
        assert batched(spectrum).data_ptr() == spectrum.data_ptr()
    assert batched(strided(z)).is_contiguous()


def test_no_bins_of_zeros_are_added_unless_asked(device):
    x = inverse_input((2, 6, 4, 5)).to(device)
    m = inverse_spectrogram_cmx(x, (2, 3), *PRODUCT)
    assert m.shape == (2, 8, 15)
    assert torch.equal(inverse_spectrogram_cmx(x, (2, 3), *PRODUCT, zeros=(1, 4))[:, 1:-4], m)


def test_gradients_in_float64(device):
    z = magnitudes((4, 6), *PRODUCT, torch.complex128).to(device)
    z = torch.where(z.abs() < 1e-3, 1, z).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: spectrogram_cmx(z, (2, 3), *PRODUCT), z)
    x = (2.6 * torch.rand(6, 2, 2, dtype=torch.float64, device=device) - 1.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: inverse_spectrogram_cmx(x, (2, 3), *PRODUCT, (1, 2)), x)


def test_ops_are_well_formed(device):
    x = torch.randn(2, 4, 6, device=device, requires_grad=True)
    z = torch.randn(2, 4, 6, dtype=torch.complex64, device=device)
    y = torch.randn(2, 6, 2, 2, device=device)
    with use("reference"):  # opcheck compares runs of the op on copies; the implementations are compared above
        torch.library.opcheck(torch.ops.mars.cmx.default, (x, 2, 3))
        torch.library.opcheck(torch.ops.mars.inverse_cmx.default, (y.clone().requires_grad_(), 2, 3))
    for spectrum in (z, bins_contiguous(z), strided(z)):
        copy = spectrum.detach()
        torch.library.opcheck(torch.ops.mars.spectrogram_cmx.default, (copy.requires_grad_(), 2, 3, *PRODUCT))
        torch.library.opcheck(torch.ops.mars.spectrogram_cmx_backward.default, (y, spectrum.detach(), 2, 3, *PRODUCT))
    args = (y.clamp(-0.9, 0.9).requires_grad_(), 2, 3, *PRODUCT, 1, 2)
    torch.library.opcheck(torch.ops.mars.inverse_spectrogram_cmx.default, args)


def test_compiles_as_one_graph(device):
    def everything(x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = spectrogram_cmx(z, (2, 3), *PRODUCT)
        return inverse_cmx(cmx(x, (2, 3)) + y, (2, 3)), inverse_spectrogram_cmx(y, (2, 3), *PRODUCT)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    x, z = torch.randn(4, 6, device=device), torch.randn(4, 6, dtype=torch.complex64, device=device)
    for got, expected in zip(compiled(x, z), everything(x, z), strict=True):
        assert torch.equal(got, expected)
    leaf = z.clone().requires_grad_()
    compiled(x, leaf)[0].sum().backward()
    expected = reference.spectrogram_cmx_backward(torch.ones(6, 2, 2, device=device), z, (2, 3), *PRODUCT)
    torch.testing.assert_close(leaf.grad, expected)


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectrogram_cmx(torch.zeros(4, 4), (2, 2), *PRODUCT), "complex64 or complex128, got torch.float32"),
        (lambda: spectrogram_cmx(SILENCE, (3, 1), *PRODUCT), "spectrogram_cmx: factor r_f=3 does not divide F=4"),
        (lambda: spectrogram_cmx(SILENCE[0], (1, 1), *PRODUCT), r"want a spectrum \(..., F, T\), got shape \(4,\)"),
        (lambda: spectrogram_cmx(SILENCE, (1, 1), 0.0, 1.0), r"want epsilon in 1e-25..1e\+25, got 0.0"),
        (lambda: spectrogram_cmx(SILENCE, (1, 1), 1.0, 0.04), r"want scale in 0.05..1e\+06, got 0.04"),
        (lambda: spectrogram_cmx(SILENCE, (1, 1), math.nan, 1.0), "got nan"),
        (lambda: inverse_spectrogram_cmx(torch.zeros(4, 4, 4).half(), (2, 2), *PRODUCT), "got torch.float16"),
        (lambda: inverse_spectrogram_cmx(torch.zeros(4, 4, 4), (2, 1), *PRODUCT), "want 2 channels, got 4"),
        (lambda: inverse_spectrogram_cmx(torch.zeros(4, 4, 4), (2, 2), *PRODUCT, (0, -1)), r"got \(0, -1\)"),
    ],
)
def test_impossible_spectra_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


SILENCE = torch.zeros(4, 4, dtype=torch.complex64)
