"""These are the definitions, in plain PyTorch. op.py checks the arguments, and every result is new memory."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mars.kernels.cmx import layout


def cmx(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """Permute (..., F, T) to (..., r_f r_t, F/r_f, T/r_t): y[i_f r_t + i_t, f, t] = x[f r_f + i_f, t r_t + i_t]."""
    r_f, r_t = factors
    *lead, F, T = x.shape
    n = len(lead)
    blocks = x.reshape(*lead, F // r_f, r_f, T // r_t, r_t)
    blocks = blocks.permute(*range(n), n + 1, n + 3, n, n + 2)
    return blocks.clone(memory_format=torch.contiguous_format).view(*lead, r_f * r_t, F // r_f, T // r_t)


def inverse_cmx(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """Permute (..., r_f r_t, F, T) to (..., F r_f, T r_t), which undoes `cmx`."""
    r_f, r_t = factors
    *lead, _, F, T = x.shape
    n = len(lead)
    blocks = x.reshape(*lead, r_f, r_t, F, T)
    blocks = blocks.permute(*range(n), n + 2, n, n + 3, n + 1)
    return blocks.clone(memory_format=torch.contiguous_format).view(*lead, F * r_f, T * r_t)


def spectrogram_cmx(z: Tensor, factors: tuple[int, int], epsilon: float, scale: float) -> Tensor:
    """Compute `cmx` of min(scale log(1 + |z| / epsilon) - 1, 1)."""
    x = (scale * torch.log1p(z.abs() / epsilon) - 1).clamp(max=1)  # log1p: exact at 0, accurate near it
    return cmx(x, factors)


def spectrogram_cmx_backward(grad: Tensor, z: Tensor, factors: tuple[int, int], epsilon: float, scale: float) -> Tensor:
    """Return the gradient, laid out as z: scale / (epsilon + |z|) along z / |z|, or 0 at z = 0 and |z| >= `limit`."""
    magnitude = z.abs()
    slope = inverse_cmx(grad, factors) * scale / (epsilon + magnitude)
    grad_z = torch.where((magnitude == 0) | (magnitude >= limit(epsilon, scale)), 0, slope * z.sgn())
    return layout.empty_like(z).copy_(grad_z)


def limit(epsilon: float, scale: float) -> float:
    """Return the magnitude from which on `spectrogram_cmx` is 1."""
    return epsilon * math.expm1(2 / scale)


def inverse_spectrogram_cmx(
    x: Tensor, factors: tuple[int, int], epsilon: float, scale: float, zeros: tuple[int, int]
) -> Tensor:
    """Compute epsilon (exp((x + 1) / scale) - 1) of `inverse_cmx`, x clamped to [-1, 1], between bins of zeros."""
    magnitude = epsilon * torch.expm1((inverse_cmx(x, factors).clamp(-1, 1) + 1) / scale)
    return F.pad(magnitude, (0, 0, *zeros))


def inverse_spectrogram_cmx_backward(
    grad: Tensor, x: Tensor, factors: tuple[int, int], epsilon: float, scale: float, zeros: tuple[int, int]
) -> Tensor:
    """Return the gradient to x: epsilon / scale exp((x + 1) / scale) in [-1, 1], and 0 elsewhere."""
    cropped = cmx(grad[..., zeros[0] : grad.shape[-2] - zeros[1], :], factors)
    slope = epsilon / scale * torch.exp((x + 1) / scale)
    return torch.where(x.abs() > 1, 0, cropped * slope)
