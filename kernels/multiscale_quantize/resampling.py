"""This module gives bicubic up-sampling as small dense matrices, for the kernels and the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Grid = tuple[int, int]


def pairs(flat: Sequence[int]) -> list[Grid]:
    """Return grids (h, w) of sizes that stand one after the other, as the schema of a PyTorch op needs them."""
    if len(flat) % 2:
        raise ValueError(f"multiscale_quantize: want scales in pairs (h, w), got {len(flat)} numbers")
    return list(zip(flat[::2], flat[1::2], strict=True))


@lru_cache(maxsize=256)
def bicubic_matrix(size: int, out: int) -> tuple[tuple[float, ...], ...]:
    """Return (out, size), Keys' cubic convolution (1981, eq. 15): A = -0.75, half-pixel centres, the border repeated.

    Resizes one axis as `F.interpolate(mode="bicubic", align_corners=False)` does.
    """
    if size == out:
        return tuple(tuple(float(i == j) for j in range(size)) for i in range(out))
    rows = []
    for i in range(out):
        row = [0.0] * size
        centre = (i + 0.5) * size / out - 0.5
        first = math.floor(centre) - 1
        for j in range(first, first + 4):
            row[min(max(j, 0), size - 1)] += _keys(abs(centre - j))
        rows.append(tuple(row))
    return tuple(rows)


def _keys(t: float, a: float = -0.75) -> float:
    if t <= 1:
        return ((a + 2) * t - (a + 3)) * t * t + 1
    return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a


@lru_cache(maxsize=64)
def shifted_matrices(scales: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return all scales' up-sampling to the last, shifted by -1, 0, 1, end to end: (H, 3, h), (W, 3, w).

    scales: their sizes h, w one after the other.
    """
    entries: list[float] = []
    for scale in pairs(scales):
        for size, out in zip(scale, scales[-2:], strict=True):
            none = [(0.0,) * size]
            padded = [*none, *bicubic_matrix(size, out), *none]
            entries += [entry for i in range(out) for row in padded[i : i + 3] for entry in row]
    return torch.tensor(entries, dtype=dtype, device=device)
