"""The multi-scale quantiser (Tian et al. 2024, Algorithm 1) in Triton: two kernels per scale beside the search's own.

Maps are (B, H, W, D) inside, so that the residual at the full grid is what is searched. Bicubic weights are computed
where they are needed, from exact fractions; the sums over codes are small products in full float32. Nothing waits for
the device, so that a CUDA graph can capture a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mars.kernels._triton import Compilation, cdiv, launch
from mars.kernels.multiscale_quantize import reference
from mars.kernels.multiscale_quantize.problem import Problem
from mars.kernels.nearest_code import PackedCodebook

_BLOCK_X = 16  # cells of a row that one program of `_update_kernel` computes


@triton.jit(do_not_specialize=("H", "W", "h", "w"))
def _area_kernel(residual_ptr, rows_ptr, H, W, D, h, w, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr):
    """rows (B, h, w, D): adaptive average pooling of the residual (B, H, W, D). One program: one row of a scale."""
    cell = tl.program_id(0)
    j = cell % w
    i = cell // w % h
    sample = (cell // w // h).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    y0, y1 = i * H // h, ((i + 1) * H + h - 1) // h
    x0, x1 = j * W // w, ((j + 1) * W + w - 1) // w
    total = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    for y in range(y0, y1):
        line_ptr = residual_ptr + (sample * H + y) * W * D
        for first in range(x0, x1, BLOCK_X):
            x = first + tl.arange(0, BLOCK_X)
            inside = (x < x1)[:, None] & (d < D)[None, :]
            total += tl.load(line_ptr + x[:, None] * D + d[None, :], mask=inside, other=0.0)
    mean = tl.div_rn(tl.sum(total, axis=0), ((y1 - y0) * (x1 - x0)).to(tl.float32))
    tl.store(rows_ptr + cell.to(tl.int64) * D + d, mean, mask=d < D)


@triton.jit
def _source(place, size, out):
    """Of output cells, the source cell before their centre, and how far past its centre they lie (0 <= t < 1)."""
    numerator = (2 * place + 1) * size + out  # (centre + 1) * 2 out, not negative from place -1 on
    before = numerator // (2 * out)
    return before - 1, tl.div_rn((numerator - before * (2 * out)).to(tl.float32), (2 * out).to(tl.float32))


@triton.jit
def _cubic(t, A: tl.constexpr):
    """Keys' weights of the four source cells about a point t past the second."""
    s, r = 1 + t, 1 - t
    q = 1 + r
    return (
        ((A * s - 5 * A) * s + 8 * A) * s - 4 * A,
        ((A + 2) * t - (A + 3)) * t * t + 1,
        ((A + 2) * r - (A + 3)) * r * r + 1,
        ((A * q - 5 * A) * q + 8 * A) * q - 4 * A,
    )


@triton.jit
def _codes(ids_ptr, codebook_ptr, i, h, w, j, d, D):
    """The codes of row i, clamped, at columns j: (BLOCK_J, BLOCK_D)."""
    row = tl.minimum(tl.maximum(i, 0), h - 1)
    index = tl.load(ids_ptr + row * w + j, mask=j < w, other=0)
    return tl.load(codebook_ptr + index[:, None] * D + d[None, :], mask=(j < w)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _columns(x, shift: tl.constexpr, j, w, W):
    """(BLOCK_X, BLOCK_J): up-sampling from columns j to columns x + shift, which lie at zero outside of the grid."""
    column = x + shift
    source, t = _source(column, w, W)
    w0, w1, w2, w3 = _cubic(t, -0.75)
    last = w - 1
    matrix = tl.where(tl.minimum(tl.maximum(source - 1, 0), last)[:, None] == j[None, :], w0[:, None], 0.0)
    matrix += tl.where(tl.minimum(tl.maximum(source, 0), last)[:, None] == j[None, :], w1[:, None], 0.0)
    matrix += tl.where(tl.minimum(source + 1, last)[:, None] == j[None, :], w2[:, None], 0.0)
    matrix += tl.where(tl.minimum(source + 2, last)[:, None] == j[None, :], w3[:, None], 0.0)
    return tl.where(((column >= 0) & (column < W))[:, None], matrix, 0.0)


@triton.jit
def _tap(taps_ptr, tap, d, n, D):
    inside = (d < D)[:, None] & (n < D)[None, :]
    return tl.load(taps_ptr + (tap * D + d[:, None]) * D + n[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=("k", "H", "W", "h", "w"))
def _update_kernel(
    ids_ptr,
    codebook_ptr,
    taps_ptr,
    bias_ptr,
    keep_ptr,
    residual_ptr,
    before_ptr,
    after_ptr,
    k,
    H,
    W,
    D,
    h,
    w,
    BLOCK_X: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scale k: codes, bicubic up-sampling, convolution; out of the residual (B, H, W, D), into the sums (B, D, H, W).

    One program: BLOCK_X cells of a row y and BLOCK_D channels. The convolution's taps come before the up-sampling
    along x, with which they commute: sum_dx C[x + dx] (sum_dy (R[y + dy] z) W[dy, dx]).
    """
    line = tl.program_id(0)
    y = line % H
    sample = (line // H).to(tl.int64)
    first = tl.program_id(1) * BLOCK_X
    n = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = first + tl.arange(0, BLOCK_X)
    ids_ptr += sample * h * w

    j0, _ = _source(tl.maximum(first - 1, 0), w, W)
    j = tl.maximum(j0 - 1, 0) + tl.arange(0, BLOCK_J)
    left = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    middle = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    right = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        for dy in range(3):
            row = y + dy - 1
            i, t = _source(row, h, H)
            w0, w1, w2, w3 = _cubic(t, -0.75)
            z = w0 * _codes(ids_ptr, codebook_ptr, i - 1, h, w, j, d, D)
            z += w1 * _codes(ids_ptr, codebook_ptr, i, h, w, j, d, D)
            z += w2 * _codes(ids_ptr, codebook_ptr, i + 1, h, w, j, d, D)
            z += w3 * _codes(ids_ptr, codebook_ptr, i + 2, h, w, j, d, D)
            z = tl.where((row >= 0) & (row < H), z, 0.0)
            left = tl.dot(z, _tap(taps_ptr, dy * 3, d, n, D), left, input_precision="ieee")
            middle = tl.dot(z, _tap(taps_ptr, dy * 3 + 1, d, n, D), middle, input_precision="ieee")
            right = tl.dot(z, _tap(taps_ptr, dy * 3 + 2, d, n, D), right, input_precision="ieee")
    change = tl.dot(_columns(x, -1, j, w, W), left, input_precision="ieee")
    change = tl.dot(_columns(x, 0, j, w, W), middle, change, input_precision="ieee")
    change = tl.dot(_columns(x, 1, j, w, W), right, change, input_precision="ieee")
    change += tl.load(bias_ptr + n, mask=n < D, other=0.0)[None, :]

    inside = (x < W)[:, None] & (n < D)[None, :]
    residual_ptr += ((sample * H + y) * W + x[:, None]) * D + n[None, :]
    tl.store(residual_ptr, tl.load(residual_ptr, mask=inside) - change, mask=inside)
    place = ((sample * D + n[None, :]) * H + y) * W + x[:, None]
    total = tl.load(before_ptr + place, mask=inside & (k > 0), other=0.0)
    kept = tl.load(keep_ptr + sample) > k
    tl.store(after_ptr + place, tl.where(kept, total + change, total), mask=inside)


_AREA_TILES = (4, 16)  # BLOCK_X
_UPDATE_TILES = ((16, 16), (16, 32), (32, 16))  # BLOCK_J, BLOCK_D
_AREA_D, _AREA_WARPS, _UPDATE_WARPS = 32, 1, 8


def _area_tile(width: int, w: int) -> int:
    """Take the narrow one where every window fits into it: windows reach over at most width / w + 2 cells."""
    return _AREA_TILES[width > 2 * w]


def _update_tile(dim: int, w: int) -> tuple[int, int]:
    """Take as many columns as BLOCK_X neighbouring ones and their convolution come from: at most 22, and at most w."""
    return _UPDATE_TILES[2 if w > 16 else dim > 16]


def multiscale_quantize(problem: Problem) -> tuple[Tensor, Tensor]:
    """See `op.multiscale_quantize`."""
    with torch.cuda.device_of(problem.f):
        return _quantize(problem)


def _quantize(problem: Problem) -> tuple[Tensor, Tensor]:
    f, scales, keep = problem.f, problem.scales, problem.keep
    batch, dim, height, width = f.shape
    codebook = problem.codebook.contiguous()
    packed = PackedCodebook(codebook, problem.metric, "triton")
    taps, bias = reference.fold(problem.weight, problem.ratio), (problem.bias * problem.ratio).contiguous()
    keep = f.new_full((batch,), len(scales), dtype=torch.int64) if keep is None else keep.long().contiguous()
    residual = f.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    totals = f.new_empty((len(scales), *f.shape))
    ids = []
    for k, ((h, w), q) in enumerate(zip(scales, problem.phi_index, strict=True)):
        sizes = (height, width, dim, h, w)
        rows = residual.view(-1, dim)
        if (h, w) != (height, width):
            rows = f.new_empty((batch * h * w, dim))
            if batch:
                grid = (len(rows), cdiv(dim, _AREA_D))
                constants = _area_tile(width, w), _AREA_D
                launch(_area_kernel, grid, (residual, rows), sizes, constants, warps=_AREA_WARPS, stages=1)
        ids.append(packed.search(rows).view(batch, h * w))
        if batch:
            block_j, block_d = _update_tile(dim, w)
            launch(
                _update_kernel,
                (batch * height, cdiv(width, _BLOCK_X), cdiv(dim, block_d)),
                (ids[-1], codebook, taps[q], bias[q], keep, residual, totals[max(k - 1, 0)], totals[k]),
                (k, *sizes),
                (_BLOCK_X, block_j, block_d),
                warps=_UPDATE_WARPS,
                stages=1,
            )
    return torch.cat(ids, dim=1), totals


def _configs() -> Iterator[Compilation]:
    maps = {f"{name}_ptr": "*fp32" for name in ("codebook", "taps", "bias", "residual", "before", "after", "rows")}
    types = maps | {"ids_ptr": "*i64", "keep_ptr": "*i64"} | dict.fromkeys(("k", "H", "W", "D", "h", "w"), "i32")
    tiles: list[tuple[Any, int, dict[str, int]]] = [
        (_area_kernel, _AREA_WARPS, {"BLOCK_X": block_x, "BLOCK_D": _AREA_D}) for block_x in _AREA_TILES
    ]
    tiles += [
        (_update_kernel, _UPDATE_WARPS, {"BLOCK_X": _BLOCK_X, "BLOCK_J": block_j, "BLOCK_D": block_d})
        for block_j, block_d in _UPDATE_TILES
    ]
    for kernel, warps, constants in tiles:
        for multiples in ((), ("D",)):  # Triton makes wider loads where D is a multiple of 16
            yield Compilation(
                kernel=kernel,
                tile="x".join(map(str, constants.values())) + (" D%16" if multiples else ""),
                signature={name: types[name] for name in kernel.arg_names if name not in constants},
                constants=constants,
                warps=warps,
                stages=1,
                multiples_of_16=multiples,
            )


CONFIGS = tuple(_configs())
