"""Channel multiplexing, and the normalised log magnitude and its inverse in the same pass, on a GPU.

A program reads a tile of segments of rows, computes in registers, and writes the frames of each residue modulo r_t as a
row of their own; where bins and not frames are contiguous, the tile is transposed on the way. All is bound by memory,
and where sizes and strides are multiples of 16 bytes it moves 16 at a time (of a spectrum whose bins are contiguous 8:
its frames are an odd number of complex numbers apart). Logarithm and exponential are those of
native.cpp, polynomials, since the GPU's own are not as accurate as PyTorch's.

Frame factors other than those of `_SPLITS` take a second pass through a general kernel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from mars.kernels._triton import Compilation, cdiv, launch
from mars.kernels.cmx import layout, reference

_SPLITS = (1, 2, 4, 8)  # frame factors with kernels of their own
_FRAMES = 256  # of a tile whose frames are contiguous
_ROWS = {1: 32, 2: 16, 4: 8, 8: 4}  # bytes of an element: rows of such a tile
_TILE_FRAMES, _TILE_BINS = 64, 32  # of a tile whose bins are contiguous
_BLOCK = 1024  # elements of a program of the general kernel
_WARPS = 4
_STAGES = 3  # Triton's default; without effect, as there are no loops
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_INFINITY = tl.constexpr(float("inf"))
_LARGE = tl.constexpr(2.0**124)
_TINY = tl.constexpr(2.0**-120)
_ROUND = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _normalised(re, im, inverse, slope):
    """min(scale log(1 + |z| / epsilon) - 1, 1) for inverse = 1 / epsilon and slope = scale log(2)."""
    a, b = re * inverse, im * inverse
    square = a * a + (b * b + _TINY)
    infinite = (tl.abs(a) == _INFINITY) | (tl.abs(b) == _INFINITY)
    t = tl.sqrt(tl.where((square > _LARGE) | infinite, _LARGE, square))
    biased = (_bits(1 + t) + (0x3F800000 - 0x3F3504F3)) >> 23  # 1 + t = 2^e (1 + f)
    power = _float((254 - biased) << 23)  # 2^-e
    f = t * power + (power - 1)
    q = 1.258434206e-01 * f - 2.067874670e-01
    q = q * f + 2.154807597e-01
    q = q * f - 2.390148491e-01
    q = q * f + 2.879534960e-01
    q = q * f - 3.607005775e-01
    q = q * f + 4.809089601e-01
    q = q * f - 7.213473916e-01
    q = q * f + 1.442695022e00
    x = slope * (f * q) + (slope * (biased - 127).to(tl.float32) - 1)
    return tl.where(x > 1, 1.0, x)


@triton.jit
def _normalised_backward(grad, re, im, epsilon, scale, limit):
    """Gradients to the real and to the imaginary part."""
    most = tl.maximum(_bits(tl.abs(re)), _bits(tl.abs(im)))
    exponent = tl.minimum(most >> 23, 253)
    power = _float((254 - exponent) << 23)  # 2^-e, so that no square overflows
    a, b = re * power, im * power
    scaled = tl.sqrt(a * a + (b * b + _TINY))
    magnitude = scaled * _float(exponent << 23)
    slope = grad * scale / (epsilon + magnitude) / scaled
    zero = (most == 0) | (magnitude >= limit)
    return tl.where(zero, 0.0, slope * a), tl.where(zero, 0.0, slope * b)


@triton.jit
def _magnitude(x, epsilon, high, low):
    """epsilon expm1((clamp(x, -1, 1) + 1) / scale) for high + low = log2(e) / scale."""
    x = tl.where(x < -1, -1.0, x)
    x = tl.where(x > 1, 1.0, x) + 1
    shifted = x * high + _ROUND  # whole, in the low bits
    r = x * low + (x * high + (_ROUND - shifted))
    power = _float((_bits(shifted) << 23) + 0x3F800000)
    q = 1.538211363e-04 * r + 1.338738250e-03
    q = q * r + 9.618311189e-03
    q = q * r + 5.550367385e-02
    q = q * r + 2.402264923e-01
    q = q * r + 6.931471825e-01
    return epsilon * (power * (r * q) + (power - 1))


@triton.jit
def _row_offset(sample, bin, bins, r_f, columns, R_T: tl.constexpr):
    """Of the first frame of a bin in the CMX tensor; int64."""
    return sample * bins * columns * R_T + (bin % r_f) * R_T * (bins // r_f) * columns + bin // r_f * columns


@triton.jit
def _split(x, R_T: tl.constexpr):
    """(rows, frames) -> (rows, R_T, frames / R_T)."""
    return tl.permute(tl.reshape(x, [x.shape[0], x.shape[1] // R_T, R_T]), (0, 2, 1))


@triton.jit
def _join(x):
    """(rows, R_T, columns) -> (rows, frames)."""
    return tl.reshape(tl.permute(x, (0, 2, 1)), [x.shape[0], x.shape[1] * x.shape[2]])


@triton.jit
def _channels(offset, kept, first, bins, r_f, columns, COLUMNS: tl.constexpr, R_T: tl.constexpr):
    """Offsets (rows, R_T, COLUMNS) and mask of a tile in the CMX tensor, of rows that start at `offset`."""
    i_t = tl.arange(0, R_T).to(tl.int64)[None, :, None] * (bins // r_f) * columns
    column = first + tl.arange(0, COLUMNS)[None, None, :]
    return offset[:, None, None] + i_t + column, kept[:, None, None] & (column < columns)


@triton.jit
def _cmx_kernel(
    x_ptr,  # (rows, columns R_T): rows are those of all samples
    y_ptr,  # (samples, r_f R_T, bins / r_f, columns)
    rows,
    bins,
    columns,
    r_f,
    R_T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INVERSE: tl.constexpr,  # from y to x
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    frame = first * R_T + tl.arange(0, COLUMNS * R_T)[None, :]
    x_at, x_in = row[:, None] * (columns * R_T) + frame, (row < rows)[:, None] & (frame < columns * R_T)
    offset = _row_offset(row // bins, row % bins, bins, r_f, columns, R_T)
    y_at, y_in = _channels(offset, row < rows, first, bins, r_f, columns, COLUMNS, R_T)
    if INVERSE:
        tl.store(x_ptr + x_at, _join(tl.load(y_ptr + y_at, mask=y_in)), mask=x_in)
    else:
        tl.store(y_ptr + y_at, _split(tl.load(x_ptr + x_at, mask=x_in), R_T), mask=y_in)


@triton.jit
def _general_cmx_kernel(
    x_ptr,  # (samples, bins, columns r_t)
    y_ptr,  # (samples, r_f r_t, bins / r_f, columns)
    size,
    bins,
    columns,
    r_f,
    r_t,
    BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):
    y_at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column, row = y_at % columns, y_at // columns
    f, channel = row % (bins // r_f), row // (bins // r_f)
    sample, c = channel // (r_f * r_t), channel % (r_f * r_t)
    x_at = ((sample * bins + f * r_f + c // r_t) * columns + column) * r_t + c % r_t
    if INVERSE:
        tl.store(x_ptr + x_at, tl.load(y_ptr + y_at, mask=y_at < size), mask=y_at < size)
    else:
        tl.store(y_ptr + y_at, tl.load(x_ptr + x_at, mask=y_at < size), mask=y_at < size)


@triton.jit
def _spectrogram_rows_kernel(
    z_ptr,  # interleaved complex (samples, bins, columns R_T) with contiguous frames
    x_ptr,  # the CMX tensor
    grad_z_ptr,  # as z, with strides of its own
    rows,
    bins,
    columns,
    r_f,
    z_sample,  # strides in complex numbers
    z_bin,
    grad_z_sample,
    grad_z_bin,
    inverse,  # 1 / epsilon
    slope,  # scale log(2)
    epsilon,
    scale,
    limit,
    R_T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BACKWARD: tl.constexpr,  # x is the gradient and grad_z the result
):
    FRAMES: tl.constexpr = COLUMNS * R_T
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sample, bin = row // bins, row % bins
    first = tl.program_id(1) * COLUMNS
    part = 2 * R_T * first + tl.arange(0, 2 * FRAMES)[None, :]  # real and imaginary
    kept = (row < rows)[:, None] & (part < 2 * R_T * columns)
    z = tl.load(z_ptr + 2 * (sample * z_sample + bin * z_bin)[:, None] + part, mask=kept, other=0.0)
    re, im = tl.split(tl.reshape(z, [ROWS, FRAMES, 2]))
    offset = _row_offset(sample, bin, bins, r_f, columns, R_T)
    x_at, x_in = _channels(offset, row < rows, first, bins, r_f, columns, COLUMNS, R_T)
    if BACKWARD:
        grad = _join(tl.load(x_ptr + x_at, mask=x_in, other=0.0))
        grad_re, grad_im = _normalised_backward(grad, re, im, epsilon, scale, limit)
        grad_z = tl.reshape(tl.join(grad_re, grad_im), [ROWS, 2 * FRAMES])
        tl.store(grad_z_ptr + 2 * (sample * grad_z_sample + bin * grad_z_bin)[:, None] + part, grad_z, mask=kept)
    else:
        tl.store(x_ptr + x_at, _split(_normalised(re, im, inverse, slope), R_T), mask=x_in)


@triton.jit
def _spectrogram_tiles_kernel(
    z_ptr,  # interleaved complex (samples, bins, columns R_T) with contiguous bins
    x_ptr,
    grad_z_ptr,
    bins,
    columns,
    r_f,
    z_sample,
    z_frame,
    grad_z_sample,
    grad_z_frame,
    inverse,
    slope,
    epsilon,
    scale,
    limit,
    R_T: tl.constexpr,
    BINS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    FRAMES: tl.constexpr = COLUMNS * R_T
    tiles = tl.cdiv(bins, BINS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first_bin, first = tl.program_id(0) % tiles * BINS, tl.program_id(1) * COLUMNS
    frame = first * R_T + tl.arange(0, FRAMES).to(tl.int64)[:, None]
    part = 2 * first_bin + tl.arange(0, 2 * BINS)[None, :]  # real and imaginary
    kept = (frame < columns * R_T) & (part < 2 * bins)
    z = tl.load(z_ptr + 2 * (sample * z_sample + frame * z_frame) + part, mask=kept, other=0.0)
    re, im = tl.split(tl.reshape(z, [FRAMES, BINS, 2]))
    bin = first_bin + tl.arange(0, BINS).to(tl.int64)
    offset = _row_offset(sample, bin, bins, r_f, columns, R_T)
    x_at, x_in = _channels(offset, bin < bins, first, bins, r_f, columns, COLUMNS, R_T)
    if BACKWARD:
        grad = tl.trans(_join(tl.load(x_ptr + x_at, mask=x_in, other=0.0)))
        grad_re, grad_im = _normalised_backward(grad, re, im, epsilon, scale, limit)
        grad_z = tl.reshape(tl.join(grad_re, grad_im), [FRAMES, 2 * BINS])
        tl.store(grad_z_ptr + 2 * (sample * grad_z_sample + frame * grad_z_frame) + part, grad_z, mask=kept)
    else:
        tl.store(x_ptr + x_at, _split(tl.trans(_normalised(re, im, inverse, slope)), R_T), mask=x_in)


@triton.jit
def _magnitude_kernel(
    x_ptr,  # the CMX tensor
    m_ptr,  # (samples, below + bins + above, columns R_T)
    rows,
    bins,
    columns,
    r_f,
    below,
    above,
    epsilon,
    high,
    low,
    R_T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sample, bin = row // (below + bins + above), row % (below + bins + above) - below
    first = tl.program_id(1) * COLUMNS
    offset = _row_offset(sample, bin, bins, r_f, columns, R_T)
    kept = (row < rows) & (bin >= 0) & (bin < bins)
    x_at, x_in = _channels(offset, kept, first, bins, r_f, columns, COLUMNS, R_T)
    m = _magnitude(_join(tl.load(x_ptr + x_at, mask=x_in, other=-1.0)), epsilon, high, low)  # -1: magnitude 0
    frame = first * R_T + tl.arange(0, COLUMNS * R_T)[None, :]
    kept = (row < rows)[:, None] & (frame < columns * R_T)
    tl.store(m_ptr + row[:, None] * (columns * R_T) + frame, m, mask=kept)


def _row_tile(r_t: int, element_size: int) -> tuple[int, int, int]:
    """Return R_T, ROWS and COLUMNS."""
    return r_t, _ROWS[element_size], _FRAMES // r_t


def _turned_tile(r_t: int) -> tuple[int, int, int]:
    """Return R_T, BINS and COLUMNS."""
    return r_t, _TILE_BINS, _TILE_FRAMES // r_t


def cmx(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """See `op.cmx`."""
    x = layout.plain(x)
    y = x.new_empty(layout.multiplexed(x, *factors))
    _copy(x, y, *factors, inverse=False)
    return y


def inverse_cmx(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """See `op.inverse_cmx`."""
    x = layout.plain(x)
    y = x.new_empty(layout.demultiplexed(x, *factors))
    _copy(y, x, *factors, inverse=True)
    return y


def _copy(x: Tensor, y: Tensor, r_f: int, r_t: int, inverse: bool) -> None:
    """Copy contiguous x (..., bins, frames), of any dtype, to the contiguous CMX tensor y; inverse: y to x."""
    if x.numel() == 0:
        return
    if x.dtype == torch.complex128:
        for part in (0, 1):
            x_part, y_part = (torch.view_as_real(t)[..., part].contiguous() for t in (x, y))
            _copy(x_part, y_part, r_f, r_t, inverse)
            torch.view_as_real(x if inverse else y)[..., part] = x_part if inverse else y_part
        return
    (*_, bins, frames), columns = x.shape, y.shape[-1]
    rows, size = x.numel() // frames, x.element_size()
    # Seen as integers, which a copy does not alter.
    if x.is_complex():
        x, y = (torch.view_as_real(t).flatten(-2) for t in (x, y))
    x, y = x.view(_INTEGERS[size]), y.view(_INTEGERS[size])
    if r_t in _SPLITS:
        tile = _row_tile(r_t, size)
        grid, numbers = (cdiv(rows, tile[1]), cdiv(columns, tile[2])), (rows, bins, columns, r_f)
        launch(_cmx_kernel, grid, (x, y), numbers, (*tile, inverse), warps=_WARPS, stages=_STAGES)
    else:
        numbers = rows * frames, bins, columns, r_f, r_t
        grid = (cdiv(rows * frames, _BLOCK),)
        launch(_general_cmx_kernel, grid, (x, y), numbers, (_BLOCK, inverse), warps=_WARPS, stages=_STAGES)


def spectrogram_cmx(z: Tensor, factors: tuple[int, int], epsilon: float, scale: float) -> Tensor:
    """See `op.spectrogram_cmx`; z is complex64."""
    x = z.new_empty(layout.multiplexed(z, *factors), dtype=torch.float32)
    z = layout.batched(z)
    _spectrogram(z, x, *factors, epsilon, scale)
    return x


def _spectrogram(z: Tensor, x: Tensor, r_f: int, r_t: int, epsilon: float, scale: float) -> None:
    """Compute the contiguous CMX tensor x of complex z (samples, bins, frames), its frames or bins contiguous."""
    if z.numel() == 0:
        return
    if r_t not in _SPLITS:
        whole = x.new_empty(z.shape)
        _spectrogram(z, whole, 1, 1, epsilon, scale)
        return _copy(whole, x, r_f, r_t, inverse=False)
    _launch_spectrogram(z, x, z, r_f, r_t, epsilon, scale, backward=False)


def spectrogram_cmx_backward(grad: Tensor, z: Tensor, factors: tuple[int, int], epsilon: float, scale: float) -> Tensor:
    """Return the gradient of `spectrogram_cmx` to z, in memory whose contiguous dimension is that of z."""
    grad_z = layout.empty_like(z)
    _spectrogram_backward(layout.plain(grad), layout.batched(z), layout.batched(grad_z), *factors, epsilon, scale)
    return grad_z


def _spectrogram_backward(
    grad: Tensor, z: Tensor, grad_z: Tensor, r_f: int, r_t: int, epsilon: float, scale: float
) -> None:
    """Compute grad_z, whose contiguous dimension is that of z (samples, bins, frames)."""
    if z.numel() == 0:
        return
    if r_t not in _SPLITS:
        whole = grad.new_empty(z.shape)
        _copy(whole, grad, r_f, r_t, inverse=True)
        return _spectrogram_backward(whole, z, grad_z, 1, 1, epsilon, scale)
    _launch_spectrogram(z, grad, grad_z, r_f, r_t, epsilon, scale, backward=True)


def _launch_spectrogram(
    z: Tensor, x: Tensor, grad_z: Tensor, r_f: int, r_t: int, epsilon: float, scale: float, backward: bool
) -> None:
    samples, bins, frames = z.shape
    columns = frames // r_t
    parts, grad_parts = torch.view_as_real(z), torch.view_as_real(grad_z)
    settings = 1 / epsilon, scale * math.log(2), epsilon, scale, reference.limit(epsilon, scale)
    sizes: tuple[int, ...]
    if z.stride(2) == 1:
        kernel, tile = _spectrogram_rows_kernel, _row_tile(r_t, z.element_size())
        grid = cdiv(samples * bins, tile[1]), cdiv(columns, tile[2])
        sizes = samples * bins, bins, columns, r_f, *z.stride()[:2], *grad_z.stride()[:2]
    else:
        kernel, tile = _spectrogram_tiles_kernel, _turned_tile(r_t)
        grid = samples * cdiv(bins, tile[1]), cdiv(columns, tile[2])
        sizes = bins, columns, r_f, *z.stride()[::2], *grad_z.stride()[::2]
    pointers, constants = (parts, x, grad_parts), (*tile, backward)
    launch(kernel, grid, pointers, (*sizes, *settings), constants, warps=_WARPS, stages=_STAGES)


def inverse_spectrogram_cmx(
    x: Tensor, factors: tuple[int, int], epsilon: float, scale: float, zeros: tuple[int, int]
) -> Tensor:
    """See `op.inverse_spectrogram_cmx`; x is float32."""
    x = layout.plain(x)
    m = x.new_empty(layout.demultiplexed(x, *factors, sum(zeros)))
    _magnitudes(x, m, *factors, epsilon, scale, *zeros)
    return m


def _magnitudes(x: Tensor, m: Tensor, r_f: int, r_t: int, epsilon: float, scale: float, below: int, above: int) -> None:
    """Compute contiguous magnitudes m (..., below + bins + above, frames) of a contiguous CMX tensor x."""
    if m.numel() == 0:
        return
    (*_, bins, frames), columns = m.shape, x.shape[-1]
    bins -= below + above
    if r_t not in _SPLITS:
        whole = x.new_empty(*x.shape[:-3], 1, bins, frames)
        _copy(whole.squeeze(-3), x, r_f, r_t, inverse=True)
        return _magnitudes(whole, m, 1, 1, epsilon, scale, below, above)
    rows, tile = m.numel() // frames, _row_tile(r_t, 4)
    grid = cdiv(rows, tile[1]), cdiv(columns, tile[2])
    factor = math.log2(math.e) / scale
    high = float(np.float32(factor))
    numbers = rows, bins, columns, r_f, below, above, epsilon, high, factor - high
    launch(_magnitude_kernel, grid, (x, m), numbers, tile, warps=_WARPS, stages=_STAGES)


def _configs() -> tuple[Compilation, ...]:
    out = []

    def add(kernel: Any, tile: str, signature: dict[str, str], constants: dict[str, Any], **promises: Any) -> None:
        out.append(
            Compilation(
                kernel=kernel,
                tile=tile,
                signature=signature,
                constants=constants,
                warps=_WARPS,
                stages=_STAGES,
                **promises,
            )
        )

    def rows(r_t: int, size: int) -> dict[str, int]:
        return dict(zip(("R_T", "ROWS", "COLUMNS"), _row_tile(r_t, size), strict=True))

    def integers(*names: str) -> dict[str, str]:
        return dict.fromkeys(names, "i32")

    spectra = {
        **dict.fromkeys(("z_ptr", "x_ptr", "grad_z_ptr"), "*fp32"),
        **dict.fromkeys(("inverse", "slope", "epsilon", "scale", "limit"), "fp32"),
    }
    wide = {"wide_loads": True, "wide_stores": True}
    for size in _ROWS:
        pointers = dict.fromkeys(("x_ptr", "y_ptr"), f"*i{8 * size}")
        for inverse in (False, True):
            way = f"{8 * size} bit {'inverse' if inverse else 'forward'}"
            names = integers("rows", "bins", "columns", "r_f")
            for r_t in _SPLITS:
                constants = {**rows(r_t, size), "INVERSE": inverse}
                promises = {"multiples_of_16": ("columns",), **wide}
                add(_cmx_kernel, f"r_t={r_t} {way}", {**pointers, **names}, constants, **promises)
            names = integers("size", "bins", "columns", "r_f", "r_t")
            constants = {"BLOCK": _BLOCK, "INVERSE": inverse}
            add(_general_cmx_kernel, way, {**pointers, **names}, constants)
    for r_t in _SPLITS:
        for backward in (False, True):
            tile = f"r_t={r_t} {'backward' if backward else 'forward'}"
            strides = ("z_sample", "z_bin", "grad_z_sample", "grad_z_bin")
            names = integers("rows", "bins", "columns", "r_f", *strides)
            constants = {**rows(r_t, 8), "BACKWARD": backward}
            promises = {"multiples_of_16": ("columns", *strides), **wide}
            add(_spectrogram_rows_kernel, tile, {**spectra, **names}, constants, **promises)
            names = integers("bins", "columns", "r_f", "z_sample", "z_frame", "grad_z_sample", "grad_z_frame")
            constants = {**dict(zip(("R_T", "BINS", "COLUMNS"), _turned_tile(r_t), strict=True)), "BACKWARD": backward}
            add(_spectrogram_tiles_kernel, tile, {**spectra, **names}, constants, multiples_of_16=("columns",))
        signature = {
            **dict.fromkeys(("x_ptr", "m_ptr"), "*fp32"),
            **integers("rows", "bins", "columns", "r_f", "below", "above"),
            **dict.fromkeys(("epsilon", "high", "low"), "fp32"),
        }
        promises = {"multiples_of_16": ("columns",), **wide}
        add(_magnitude_kernel, f"r_t={r_t}", signature, rows(r_t, 4), **promises)
    return tuple(out)


CONFIGS = _configs()
