"""This module gives the shapes of CMX tensors, and lays arguments out as the kernels read them."""

from __future__ import annotations

import math

from torch import Tensor


def multiplexed(x: Tensor, r_f: int, r_t: int) -> tuple[int, ...]:
    """Return the shape of `cmx` of x (..., F, T)."""
    *lead, F, T = x.shape
    return *lead, r_f * r_t, F // r_f, T // r_t


def demultiplexed(x: Tensor, r_f: int, r_t: int, more_bins: int = 0) -> tuple[int, ...]:
    """Return the shape of `inverse_cmx` of x (..., channels, F, T), with more bins."""
    *lead, _, F, T = x.shape
    return *lead, F * r_f + more_bins, T * r_t


def sizes(x: Tensor) -> tuple[int, int, int]:
    """Return (samples, bins, frames) of x (..., bins, frames)."""
    *lead, F, T = x.shape
    return math.prod(lead), F, T


def plain(x: Tensor) -> Tensor:
    """Return x contiguous, with its values in memory: no conjugation or negation is left for the reader to do."""
    return x.resolve_conj().resolve_neg().contiguous()


def _bins_contiguous(z: Tensor) -> bool:
    return z.stride(-2) == 1 and z.stride(-1) != 1


def empty_like(z: Tensor) -> Tensor:
    """Return new memory of the shape of z, whose bins are contiguous where those of z are, else its frames."""
    return z.new_empty(z.mT.shape).mT if _bins_contiguous(z) else z.new_empty(z.shape)


def batched(z: Tensor) -> Tensor:
    """Return z as (samples, bins, frames) with contiguous bins or frames, copied only where no view gives that."""
    z = z.resolve_conj()
    if z.ndim == 3 and 1 in z.stride()[1:]:
        return z
    n, F, T = sizes(z)
    if _bins_contiguous(z):
        return z.mT.reshape(n, T, F).mT
    return (z if z.stride(-1) == 1 else z.contiguous()).reshape(n, F, T)
