"""Channel multiplexing (CMX) turns neighbouring bins and frames into channels, exactly and without parameters.

Ristori et al., "MARS", arXiv:2509.26007: a spectrogram gets shorter along both axes, with more channels, so
that a tokeniser can afford it. Channel c = i_f * r_t + i_t holds the bins i_f, i_f + r_f, ... and the frames
i_t, i_t + r_t, ...: the order of `torch.nn.PixelUnshuffle`, with a factor for each axis.

`spectrogram_cmx` and `inverse_spectrogram_cmx` take the logarithm of a spectrum, or undo it, in the same pass.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

import torch
from torch import Tensor

from mars.kernels import _backend, _native
from mars.kernels._direct import direct
from mars.kernels.cmx import layout, native, reference

# Within these float32 neither overflows below the clipping nor loses silence.
_EPSILONS = (1e-25, 1e25)
_SCALES = (0.05, 1e6)


def cmx(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """Multiplex bins and frames into channels.

    x: (..., F, T), any dtype, any strides. factors: (r_f, r_t), which must divide (F, T).
    Returns (..., r_f * r_t, F / r_f, T / r_t), contiguous; a view of x where factors (1, 1) allow it.
    Raises ValueError naming the factors and the sizes that would fit.
    """
    if tuple(factors) == (1, 1):
        _check_divides("cmx", "x", x, 1, 1)
        return x.contiguous().unsqueeze(-3)
    return _compute_cmx(x, *map(index, factors)) if direct(x) else torch.ops.mars.cmx(x, *factors)


def inverse_cmx(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """Undo `cmx` bit for bit.

    x: (..., r_f * r_t, F, T), any dtype, any strides. factors: the (r_f, r_t) given to `cmx`.
    Returns (..., F * r_f, T * r_t), contiguous; a view of x where factors (1, 1) allow it.
    Raises ValueError naming the factors that fit the channels of x.
    """
    if tuple(factors) == (1, 1):
        _check_channels("inverse_cmx", x, 1, 1)
        return x.contiguous().squeeze(-3)
    return _compute_inverse_cmx(x, *map(index, factors)) if direct(x) else torch.ops.mars.inverse_cmx(x, *factors)


def spectrogram_cmx(spectrum: Tensor, factors: tuple[int, int], epsilon: float, scale: float) -> Tensor:
    """Compute `cmx` of min(scale * log(1 + |z| / epsilon) - 1, 1), the log magnitude of a spectrum, in one pass.

    spectrum: (..., F, T), complex64 (fastest where frames or bins are contiguous) or complex128 (plain PyTorch).
    factors: (r_f, r_t), which must divide (F, T). epsilon: 1e-25..1e25, in units of the spectrum. scale: 0.05..1e6.
    Returns (..., r_f * r_t, F / r_f, T / r_t), contiguous, float32 or float64; 0 becomes -1 exactly. An element's
    bits depend on its value alone, not on its place or the factors. The gradient is 0 where the spectrum is 0 and
    where its magnitude is epsilon * expm1(2 / scale) or more, which is clipped to 1.
    Raises ValueError.
    """
    if direct(spectrum):
        return _compute_spectrogram_cmx(spectrum, *map(index, factors), epsilon, scale)
    return torch.ops.mars.spectrogram_cmx(spectrum, *factors, epsilon, scale)


def inverse_spectrogram_cmx(
    x: Tensor, factors: tuple[int, int], epsilon: float, scale: float, zeros: tuple[int, int] = (0, 0)
) -> Tensor:
    """Undo `spectrogram_cmx`: compute the magnitudes epsilon * expm1((x + 1) / scale) of a CMX tensor in one pass.

    x: (..., r_f * r_t, F, T), float32 or float64 (plain PyTorch), clamped to [-1, 1]. zeros: how many bins of
    zeros to add below and above. factors, epsilon and scale: those given to `spectrogram_cmx`.
    Returns (..., zeros[0] + F * r_f + zeros[1], T * r_t), contiguous, of the dtype of x; -1 becomes 0 exactly. An
    element's bits depend on its value alone. The gradient is 0 outside [-1, 1].
    Raises ValueError.
    """
    if direct(x):
        (r_f, r_t), (below, above) = map(index, factors), map(index, zeros)
        return _compute_inverse_spectrogram_cmx(x, r_f, r_t, epsilon, scale, below, above)
    return torch.ops.mars.inverse_spectrogram_cmx(x, *factors, epsilon, scale, *zeros)


_TRITON = "mars.kernels.cmx.triton"
_CMX: dict[str, Callable[..., Tensor]] = {
    "reference": reference.cmx,
    "native": native.cmx,
    "triton": _backend.deferred(_TRITON, "cmx"),
}
_INVERSE_CMX: dict[str, Callable[..., Tensor]] = {
    "reference": reference.inverse_cmx,
    "native": native.inverse_cmx,
    "triton": _backend.deferred(_TRITON, "inverse_cmx"),
}
_SPECTROGRAM_CMX: dict[str, Callable[..., Tensor]] = {
    "reference": reference.spectrogram_cmx,
    "native": native.spectrogram_cmx,
    "triton": _backend.deferred(_TRITON, "spectrogram_cmx"),
}
_SPECTROGRAM_CMX_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "reference": reference.spectrogram_cmx_backward,
    "native": native.spectrogram_cmx_backward,
    "triton": _backend.deferred(_TRITON, "spectrogram_cmx_backward"),
}
_INVERSE_SPECTROGRAM_CMX: dict[str, Callable[..., Tensor]] = {
    "reference": reference.inverse_spectrogram_cmx,
    "native": native.inverse_spectrogram_cmx,
    "triton": _backend.deferred(_TRITON, "inverse_spectrogram_cmx"),
}


def _kernels_of(x: Tensor) -> str:
    """Return the backend for x; double precision is computed in plain PyTorch."""
    backend = _backend.backend(x.device.type)
    return "reference" if x.dtype in (torch.float64, torch.complex128) else backend


def _compute_cmx(x: Tensor, r_f: int, r_t: int) -> Tensor:
    _check_divides("cmx", "x", x, r_f, r_t)
    _native.check_memory("cmx", x)
    return _backend.select("cmx", _CMX, _backend.backend(x.device.type))(x, (r_f, r_t))


_cmx = torch.library.custom_op("mars::cmx", _compute_cmx, mutates_args=())


@_cmx.register_fake
def _cmx_fake(x: Tensor, r_f: int, r_t: int) -> Tensor:
    _check_divides("cmx", "x", x, r_f, r_t)
    return x.new_empty(layout.multiplexed(x, r_f, r_t))


def _compute_inverse_cmx(x: Tensor, r_f: int, r_t: int) -> Tensor:
    _check_channels("inverse_cmx", x, r_f, r_t)
    _native.check_memory("inverse_cmx", x)
    return _backend.select("inverse_cmx", _INVERSE_CMX, _backend.backend(x.device.type))(x, (r_f, r_t))


_inverse_cmx = torch.library.custom_op("mars::inverse_cmx", _compute_inverse_cmx, mutates_args=())


@_inverse_cmx.register_fake
def _inverse_cmx_fake(x: Tensor, r_f: int, r_t: int) -> Tensor:
    _check_channels("inverse_cmx", x, r_f, r_t)
    return x.new_empty(layout.demultiplexed(x, r_f, r_t))


def _compute_spectrogram_cmx(z: Tensor, r_f: int, r_t: int, epsilon: float, scale: float) -> Tensor:
    _check_spectrum("spectrogram_cmx", z, r_f, r_t, epsilon, scale)
    _native.check_memory("spectrogram_cmx", z)
    backend = _kernels_of(z)
    return _backend.select("spectrogram_cmx", _SPECTROGRAM_CMX, backend)(z, (r_f, r_t), epsilon, scale)


_spectrogram_cmx = torch.library.custom_op("mars::spectrogram_cmx", _compute_spectrogram_cmx, mutates_args=())


@_spectrogram_cmx.register_fake
def _spectrogram_cmx_fake(z: Tensor, r_f: int, r_t: int, epsilon: float, scale: float) -> Tensor:
    _check_spectrum("spectrogram_cmx", z, r_f, r_t, epsilon, scale)
    return z.new_empty(layout.multiplexed(z, r_f, r_t), dtype=z.dtype.to_real())


def _compute_spectrogram_cmx_backward(
    grad: Tensor, z: Tensor, r_f: int, r_t: int, epsilon: float, scale: float
) -> Tensor:
    _check_gradient(grad, z, r_f, r_t, epsilon, scale)
    _native.check_memory("spectrogram_cmx_backward", grad, z)
    run = _backend.select("spectrogram_cmx_backward", _SPECTROGRAM_CMX_BACKWARD, _kernels_of(z))
    return run(grad, z, (r_f, r_t), epsilon, scale)


_spectrogram_cmx_backward = torch.library.custom_op(
    "mars::spectrogram_cmx_backward", _compute_spectrogram_cmx_backward, mutates_args=()
)


@_spectrogram_cmx_backward.register_fake
def _spectrogram_cmx_backward_fake(grad: Tensor, z: Tensor, r_f: int, r_t: int, epsilon: float, scale: float) -> Tensor:
    _check_gradient(grad, z, r_f, r_t, epsilon, scale)
    return layout.empty_like(z)


def _compute_inverse_spectrogram_cmx(
    x: Tensor, r_f: int, r_t: int, epsilon: float, scale: float, below: int, above: int
) -> Tensor:
    _check_inverse(x, r_f, r_t, epsilon, scale, below, above)
    _native.check_memory("inverse_spectrogram_cmx", x)
    run = _backend.select("inverse_spectrogram_cmx", _INVERSE_SPECTROGRAM_CMX, _kernels_of(x))
    return run(x, (r_f, r_t), epsilon, scale, (below, above))


_inverse_spectrogram_cmx = torch.library.custom_op(
    "mars::inverse_spectrogram_cmx", _compute_inverse_spectrogram_cmx, mutates_args=()
)


@_inverse_spectrogram_cmx.register_fake
def _inverse_spectrogram_cmx_fake(
    x: Tensor, r_f: int, r_t: int, epsilon: float, scale: float, below: int, above: int
) -> Tensor:
    _check_inverse(x, r_f, r_t, epsilon, scale, below, above)
    return x.new_empty(layout.demultiplexed(x, r_f, r_t, below + above))


def _save_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.factors = inputs[1:]


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.settings = inputs[1:]


def _backward_cmx(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.mars.inverse_cmx(grad, *ctx.factors), None, None


def _backward_inverse_cmx(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.mars.cmx(grad, *ctx.factors), None, None


def _backward_spectrogram_cmx(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return torch.ops.mars.spectrogram_cmx_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


def _backward_inverse_spectrogram_cmx(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,), (r_f, r_t, epsilon, scale, below, above) = ctx.saved_tensors, ctx.settings
    grad_x = reference.inverse_spectrogram_cmx_backward(grad, x, (r_f, r_t), epsilon, scale, (below, above))
    return grad_x, None, None, None, None, None, None


_cmx.register_autograd(_backward_cmx, setup_context=_save_factors)
_inverse_cmx.register_autograd(_backward_inverse_cmx, setup_context=_save_factors)
_spectrogram_cmx.register_autograd(_backward_spectrogram_cmx, setup_context=_save_all)
_inverse_spectrogram_cmx.register_autograd(_backward_inverse_spectrogram_cmx, setup_context=_save_all)


def _check_spectrum(name: str, z: Tensor, r_f: int, r_t: int, epsilon: float, scale: float) -> None:
    if z.dtype not in (torch.complex64, torch.complex128):
        raise ValueError(f"{name}: want a spectrum in complex64 or complex128, got {z.dtype}")
    _check_divides(name, "a spectrum", z, r_f, r_t)
    _check_normalisation(name, epsilon, scale)


def _check_gradient(grad: Tensor, z: Tensor, r_f: int, r_t: int, epsilon: float, scale: float) -> None:
    name = "spectrogram_cmx_backward"
    _check_spectrum(name, z, r_f, r_t, epsilon, scale)
    want, dtype = layout.multiplexed(z, r_f, r_t), z.dtype.to_real()
    if grad.shape != want or grad.dtype != dtype or grad.device != z.device:
        raise ValueError(
            f"{name}: want a gradient {tuple(want)} of {dtype} on {z.device}, "
            f"got {tuple(grad.shape)} of {grad.dtype} on {grad.device}"
        )


def _check_inverse(x: Tensor, r_f: int, r_t: int, epsilon: float, scale: float, below: int, above: int) -> None:
    name = "inverse_spectrogram_cmx"
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: want x in float32 or float64, got {x.dtype}")
    _check_channels(name, x, r_f, r_t)
    _check_normalisation(name, epsilon, scale)
    if below < 0 or above < 0:
        raise ValueError(f"{name}: zeros (below, above) must be 0 or more, got ({below}, {above})")


def _check_factors(name: str, r_f: int, r_t: int) -> None:
    if r_f < 1 or r_t < 1:
        raise ValueError(f"{name}: factors (r_f, r_t) must be 1 or more, got ({r_f}, {r_t})")


def _check_normalisation(name: str, epsilon: float, scale: float) -> None:
    for what, value, (least, most) in (("epsilon", epsilon, _EPSILONS), ("scale", scale, _SCALES)):
        if not least <= value <= most:
            raise ValueError(f"{name}: want {what} in {least:g}..{most:g}, got {value}")


def _check_divides(name: str, what: str, x: Tensor, r_f: int, r_t: int) -> None:
    _check_factors(name, r_f, r_t)
    if x.ndim < 2:
        raise ValueError(f"{name}: want {what} (..., F, T), got shape {tuple(x.shape)}")
    for factor_name, factor, size_name, size in (("r_f", r_f, "F", x.shape[-2]), ("r_t", r_t, "T", x.shape[-1])):
        if size % factor:
            smaller, larger = size // factor * factor, -(-size // factor) * factor
            resized = f"pad/crop {size_name} to {smaller} or {larger}" if smaller else f"pad {size_name} to {larger}"
            raise ValueError(
                f"{name}: factor {factor_name}={factor} does not divide {size_name}={size}; "
                f"use one of {', '.join(map(str, _divisors(size)))}, or {resized}"
            )


def _check_channels(name: str, x: Tensor, r_f: int, r_t: int) -> None:
    _check_factors(name, r_f, r_t)
    if x.ndim < 3:
        raise ValueError(f"{name}: want x (..., channels, F, T), got shape {tuple(x.shape)}")
    channels = x.shape[-3]
    if channels != r_f * r_t:
        fitting = ", ".join(f"({d}, {channels // d})" for d in _divisors(channels)) or "none"
        raise ValueError(
            f"{name}: factors ({r_f}, {r_t}) want {r_f * r_t} channels, got {channels}; "
            f"factors that fit {channels}: {fitting}"
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
