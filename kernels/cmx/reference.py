"""Definition of channel multiplexing in plain PyTorch; sizes are assumed to fit (op.py checks them)."""

from __future__ import annotations

from torch import Tensor


def cmx(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """(..., F, T) -> (..., r_f r_t, F/r_f, T/r_t): y[i_f r_t + i_t, f, t] = x[f r_f + i_f, t r_t + i_t]."""
    r_f, r_t = factors
    *lead, F, T = x.shape
    n = len(lead)
    blocks = x.reshape(*lead, F // r_f, r_f, T // r_t, r_t)
    blocks = blocks.permute(*range(n), n + 1, n + 3, n, n + 2)
    return blocks.reshape(*lead, r_f * r_t, F // r_f, T // r_t).contiguous()


def inverse_cmx(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """(..., r_f r_t, F, T) -> (..., F r_f, T r_t), the inverse permutation."""
    r_f, r_t = factors
    *lead, _, F, T = x.shape
    n = len(lead)
    blocks = x.reshape(*lead, r_f, r_t, F, T)
    blocks = blocks.permute(*range(n), n + 2, n, n + 3, n + 1)
    return blocks.reshape(*lead, F * r_f, T * r_t).contiguous()
