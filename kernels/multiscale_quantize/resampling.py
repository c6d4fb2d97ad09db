"""Bicubic up-sampling as a small dense matrix, for the kernels and the gradient."""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache(maxsize=256)
def bicubic_matrix(size: int, out: int) -> tuple[tuple[float, ...], ...]:
    """(out, size): Keys' cubic convolution (1981, eq. 15) with A = -0.75 at half-pixel centres, the border repeated.

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
