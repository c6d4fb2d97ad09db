"""Squared maximum mean discrepancy, unbiased, of every resample at once (Gretton et al. 2012, JMLR 13, eq. 3).

    MMD^2(w, v) = sum_{i != j} w_i w_j K(x_i, x_j) / (sum_{i != j} w_i w_j) + the same for y
                  - 2 sum_ij w_i v_j K(x_i, y_j) / (sum_i w_i sum_j v_j)

With all counts 1 it is the U-statistic. A clip can hold several frames: K is then the mean kernel over the pairs of
two clips' frames, and no pair of frames of one clip counts, because they are not independent. Values below 0 are
legitimate, and never clamped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]  # (a, d), (b, d) -> (a, b)

_BLOCK = 1024  # frames whose kernels with all others are in memory at a time


def mmd2(x: Tensor, y: Tensor, kernel: Kernel, counts_x: Tensor, counts_y: Tensor) -> Tensor:
    """Compute MMD^2 of every resample, float64 (resamples,).

    x: (n, t, d) clips, frames, features; y: (m, t, d); counts_x: (resamples, n); counts_y: (resamples, m), as
    `bootstrap.resample_counts` draws them. Everything in float64.
    """
    within = _within(x, kernel, counts_x) / _different(counts_x) + _within(y, kernel, counts_y) / _different(counts_y)
    return within - 2 * _between(x, y, kernel, counts_x, counts_y) / (counts_x.sum(1) * counts_y.sum(1))


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """Return (<x, y> / d + 1)^3 (a, b) of x (a, d), y (b, d): the kernel of KID (Binkowski et al. 2018)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(bandwidth: float) -> Kernel:
    """Return the kernel exp(-|x - y|^2 / (2 bandwidth^2))."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return squared_distances(x, y).mul_(-0.5 / bandwidth**2).exp_()

    return kernel


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return |x_i - y_j|^2 (a, b) of x (a, d), y (b, d), by way of their product and never below 0."""
    middle = y.mean(0)  # a common shift takes digits from the squares, not from the distances
    x, y = x - middle, y - middle
    return torch.addmm(x.square().sum(1, keepdim=True) + y.square().sum(1), x, y.T, alpha=-2).clamp_(min=0)


def _within(x: Tensor, kernel: Kernel, counts: Tensor) -> Tensor:
    """Return sum_{i != j} w_i w_j K(x_i, x_j) (resamples,), each pair computed once."""
    total = torch.zeros(len(counts), dtype=torch.float64)
    for start, block in _blocks(x):
        values = _clip_kernel(block, x[start:], kernel)
        values[:, : len(block)].fill_diagonal_(0)
        values[:, len(block) :] *= 2
        total += (counts[:, start : start + len(block)] * (counts[:, start:] @ values.T)).sum(1)
    return total


def _between(x: Tensor, y: Tensor, kernel: Kernel, counts_x: Tensor, counts_y: Tensor) -> Tensor:
    """Return sum_ij w_i v_j K(x_i, y_j) (resamples,)."""
    total = torch.zeros(len(counts_x), dtype=torch.float64)
    for start, block in _blocks(x):
        values = _clip_kernel(block, y, kernel)
        total += (counts_x[:, start : start + len(block)] * (counts_y @ values.T)).sum(1)
    return total


def _blocks(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(_BLOCK // x.shape[1], 1)
    return ((start, x[start : start + step]) for start in range(0, len(x), step))


def _clip_kernel(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """Return the mean kernel (a, b) over the pairs of frames of clips x (a, t, d), y (b, u, d)."""
    values = kernel(x.flatten(0, 1), y.flatten(0, 1))
    return values.view(len(x), x.shape[1], len(y), y.shape[1]).mean((1, 3))


def _different(counts: Tensor) -> Tensor:
    return counts.sum(1).square() - counts.square().sum(1)
