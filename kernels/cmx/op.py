"""Channel multiplexing (CMX): neighbouring bins and frames become channels, exactly and without parameters.

Ristori et al., "MARS", arXiv:2509.26007: a spectrogram gets shorter along both axes, with more channels, so
that a tokeniser can afford it. Channel c = i_f * r_t + i_t holds the bins i_f, i_f + r_f, ... and the frames
i_t, i_t + r_t, ...: the order of `torch.nn.PixelUnshuffle`, with a factor for each axis.
"""

from __future__ import annotations

from torch import Tensor

from mars.kernels.cmx import reference


def cmx(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """Multiplex bins and frames into channels.

    x: (..., F, T), any dtype, any strides. factors: (r_f, r_t), which must divide (F, T).
    Returns (..., r_f * r_t, F / r_f, T / r_t), contiguous; a view of x where factors (1, 1) allow it.
    Raises ValueError naming the factors and the sizes that would fit.
    """
    r_f, r_t = _checked("cmx", factors)
    if x.ndim < 2:
        raise ValueError(f"cmx: want x (..., F, T), got shape {tuple(x.shape)}")
    F, T = x.shape[-2:]
    _check_divides("r_f", r_f, "F", F)
    _check_divides("r_t", r_t, "T", T)
    return reference.cmx(x, (r_f, r_t))


def inverse_cmx(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """Undo `cmx` bit for bit.

    x: (..., r_f * r_t, F, T), any dtype, any strides. factors: the (r_f, r_t) given to `cmx`.
    Returns (..., F * r_f, T * r_t), contiguous; a view of x where factors (1, 1) allow it.
    Raises ValueError naming the factors that fit the channels of x.
    """
    r_f, r_t = _checked("inverse_cmx", factors)
    if x.ndim < 3:
        raise ValueError(f"inverse_cmx: want x (..., channels, F, T), got shape {tuple(x.shape)}")
    channels = x.shape[-3]
    if channels != r_f * r_t:
        fitting = ", ".join(f"({d}, {channels // d})" for d in _divisors(channels)) or "none"
        raise ValueError(
            f"inverse_cmx: factors ({r_f}, {r_t}) want {r_f * r_t} channels, got {channels}; "
            f"factors that fit {channels}: {fitting}"
        )
    return reference.inverse_cmx(x, (r_f, r_t))


def _checked(name: str, factors: tuple[int, int]) -> tuple[int, int]:
    r_f, r_t = factors
    if r_f < 1 or r_t < 1:
        raise ValueError(f"{name}: factors (r_f, r_t) must be 1 or more, got ({r_f}, {r_t})")
    return r_f, r_t


def _check_divides(factor_name: str, factor: int, size_name: str, size: int) -> None:
    if size % factor:
        smaller, larger = size // factor * factor, -(-size // factor) * factor
        resized = f"pad/crop {size_name} to {smaller} or {larger}" if smaller else f"pad {size_name} to {larger}"
        raise ValueError(
            f"cmx: factor {factor_name}={factor} does not divide {size_name}={size}; "
            f"use one of {', '.join(map(str, _divisors(size)))}, or {resized}"
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
