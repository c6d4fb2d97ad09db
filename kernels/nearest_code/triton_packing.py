"""This packs a codebook on a GPU in three kernels: what `packing.pack` does in more than a hundred.

The first sums the codes up, block by block; the second centres them on the mean of the blocks' sums and takes their
lengths; the third finds each code's place, the number of shorter ones, and writes it there, rounded, with its bounds.
The order of equal lengths is that of the codebook. The place takes V comparisons a code, without a sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mars.kernels._triton import Compilation, cdiv, launch
from mars.kernels.nearest_code import packing
from mars.kernels.nearest_code.packing import Packed

_GROUP, _TILE, _NONE = tl.constexpr(packing.GROUP), tl.constexpr(packing.TILE), tl.constexpr(packing.NONE)
_LARGE, _RATIO = tl.constexpr(packing.LARGE), tl.constexpr(packing.RATIO)
_UNDERFLOW = tl.constexpr(2.0**-100)
_SLACK = tl.constexpr(1 + 2.0**-8)

MOST = 1 << 16  # codes: beyond, a sort is less work than comparing each with each
_WARPS = 8
_BLOCKS = 8  # whose sums are read at a time


def _tile(depth: int) -> tuple[int, int]:
    """Return the codes of a program, of padded D values, and how many lengths it compares with at a time."""
    rows = min(64, 2048 // depth)
    return rows, 4096 // rows


@triton.jit
def _codes(codebook_ptr, code, d, V, D):
    """Codes (ROWS, DEPTH) in float64, 0 from V on and where a value is not finite, and which are finite."""
    x = tl.load(
        codebook_ptr + code[:, None].to(tl.int64) * D + d[None, :],
        mask=(code < V)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    wild = tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32), axis=1)
    finite = (code < V) & (wild == 0)
    return tl.where(finite[:, None], x, 0.0).to(tl.float64), finite


@triton.jit(do_not_specialize=["V", "D", "biased"])
def _sums_kernel(
    codebook_ptr, bias_ptr, sums_ptr, counts_ptr, bounds_ptr, V, D, biased,
    DEPTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The bias of each code, -inf if it is never chosen, and the sums (programs, DEPTH) and numbers of the others."""
    block = tl.program_id(0)
    code = block * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DEPTH)
    x, known = _codes(codebook_ptr, code, d, V, D)
    bias = tl.where(biased != 0, -0.5 * tl.sum(x * x, axis=1), 0.0).to(tl.float32)
    known = known & (bias > -float("inf"))
    x = tl.where(known[:, None], x, 0.0)
    tl.store(bias_ptr + code, tl.where(known, bias, -float("inf")))
    tl.store(sums_ptr + block * DEPTH + d, tl.sum(x, axis=0))
    tl.store(counts_ptr + block, tl.sum(known.to(tl.int32), axis=0))
    # Of each tile two rows of four bounds; a program of fewer codes than a tile clears them with others.
    bound = tl.arange(0, 8)
    tl.store(bounds_ptr + (block * ROWS // _TILE) * 8 + bound, tl.zeros([8], tl.float32))


@triton.jit(do_not_specialize=["V", "D", "blocks", "biased"])
def _lengths_kernel(
    codebook_ptr, bias_ptr, sums_ptr, counts_ptr, mean_ptr, shift_ptr, length_ptr, V, D, blocks, biased,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The squared length of each code less the mean, as float32, +inf for those never chosen; the mean."""
    code = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d, block = tl.arange(0, DEPTH), tl.arange(0, BLOCKS)
    total = tl.zeros([DEPTH], tl.float64)
    count = 0
    for first in range(0, blocks, BLOCKS):
        row = first + block
        total += tl.sum(
            tl.load(sums_ptr + row[:, None] * DEPTH + d[None, :], mask=(row < blocks)[:, None], other=0.0), axis=0
        )
        count += tl.sum(tl.load(counts_ptr + row, mask=row < blocks, other=0), axis=0)
    mean = (total / tl.maximum(count, 1).to(tl.float64)).to(tl.float32)
    if tl.program_id(0) == 0:
        tl.store(mean_ptr + d, mean)
        tl.store(shift_ptr + d, tl.where(biased != 0, mean, 0.0))
    x, _ = _codes(codebook_ptr, code, d, V, D)
    known = tl.load(bias_ptr + code) > -float("inf")
    x -= mean.to(tl.float64)[None, :]
    length = tl.minimum(tl.sum(x * x, axis=1), 3e38).to(tl.float32)  # below that of those never chosen
    tl.store(length_ptr + code, tl.where(known, length, float("inf")))


@triton.jit(do_not_specialize=["V", "D", "biased"])
def _place_kernel(
    codebook_ptr, bias_ptr, mean_ptr, length_ptr,
    codes_ptr, sorted_bias_ptr, order_ptr, rounded_ptr, rounded_bias_ptr, bounds_ptr, V, D, biased,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COMPARED: tl.constexpr,
):  # fmt: skip
    """What `Packed` holds, at the place of each code; codes from V on fill up the last tile."""
    code = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d, other = tl.arange(0, DEPTH), tl.arange(0, COMPARED)
    own = tl.load(length_ptr + code)
    shorter = tl.zeros([ROWS], tl.int32)
    for first in range(0, V, COMPARED):
        j = first + other
        length = tl.load(length_ptr + j, mask=j < V, other=float("inf"))
        before = (length[None, :] < own[:, None]) | ((length[None, :] == own[:, None]) & (j[None, :] < code[:, None]))
        shorter += tl.sum((before & (j < V)[None, :]).to(tl.int32), axis=1)
    place = tl.where(code < V, shorter, code)

    x, _ = _codes(codebook_ptr, code, d, V, D)
    bias = tl.load(bias_ptr + code)
    known = bias > -float("inf")
    x = tl.where(known[:, None], x, 0.0)
    mean = tl.load(mean_ptr + d).to(tl.float64)
    centred = tl.where(known[:, None], x - mean[None, :], 0.0)
    rounded = centred.to(tl.float32).to(tl.bfloat16)

    group = place // _GROUP
    at = (group.to(tl.int64) * D * _GROUP + place % _GROUP)[:, None] + d[None, :] * _GROUP
    tl.store(codes_ptr + at, x.to(tl.float32), mask=(d < D)[None, :] & (code >= 0)[:, None])
    tl.store(sorted_bias_ptr + place, bias)
    tl.store(order_ptr + place, tl.where(code < V, code, _NONE))
    # The tensor cores' columns: 8 j + 2 q + b holds code 2 j + b of group q.
    inner = place % _GROUP
    column = place // _TILE * _TILE + inner // 2 * 8 + group % (_TILE // _GROUP) * 2 + inner % 2
    tl.store(rounded_ptr + column.to(tl.int64)[:, None] * DEPTH + d[None, :], rounded)
    centred_bias = tl.where(biased != 0, -0.5 * tl.sum(centred * centred, axis=1), 0.0)
    tl.store(
        rounded_bias_ptr + column,
        tl.where(known, tl.maximum(centred_bias, -1e38).to(tl.float32), -float("inf")),
    )

    # As in `packing.pack`.
    chain = (D + 4).to(tl.float64) * 5.9604644775390625e-08  # 2^-24
    sums = (DEPTH + 16) * 2.384185791015625e-07  # 2^-22
    kept = rounded.to(tl.float32).to(tl.float64)
    lost = centred - kept
    length = tl.sqrt(tl.sum(x * x, axis=1))
    scale = (
        (_RATIO + sums) * tl.sqrt(tl.sum(kept * kept, axis=1)) + tl.sqrt(tl.sum(lost * lost, axis=1)) + chain * length
    )
    offset = tl.where(known, chain * tl.where(known, -bias, 0.0).to(tl.float64), 0.0) - sums * centred_bias
    offset += tl.where(biased != 0, chain * tl.sqrt(tl.sum(mean * mean, axis=0)) * length, 0.0) + _UNDERFLOW
    offset = tl.where((length > _LARGE) | (centred_bias < -1e38), float("inf"), offset)
    bound_ptr = bounds_ptr + place // _TILE * 8 + group % (_TILE // _GROUP)
    # None is negative, and of those the order of the bits is that of the numbers.
    _raise(bound_ptr, (scale * _SLACK).to(tl.float32))
    _raise(bound_ptr + 4, (offset * _SLACK).to(tl.float32))


@triton.jit
def _raise(ptr, value):
    tl.atomic_max(ptr.to(tl.pointer_type(tl.int32), bitcast=True), value.to(tl.int32, bitcast=True), sem="relaxed")


def pack(codebook: Tensor, biased: bool) -> Packed:
    """Do what `packing.pack` does, on the device of the codebook."""
    size, d = codebook.shape
    if size > MOST:
        return packing.pack(codebook, biased)
    depth = max(16, 1 << (d - 1).bit_length())
    rows, compared = _tile(depth) if codebook.is_cuda else (packing.TILE, 1024)  # interpreted: few programs
    tiles = cdiv(size, packing.TILE)
    padded = tiles * packing.TILE
    blocks = padded // rows
    floats, device = torch.float32, codebook.device

    def empty(*shape: int, dtype: torch.dtype = floats) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    packed = Packed(
        size=size,
        codes=empty(padded // packing.GROUP, d, packing.GROUP),
        bias=empty(padded),
        order=empty(padded, dtype=torch.int32),
        rounded=empty(padded, depth, dtype=torch.bfloat16),
        rounded_bias=empty(padded),
        bounds=empty(tiles, 2, 4),
        shift=empty(depth),
    )
    bias, length, mean = empty(padded), empty(padded), empty(depth)
    sums, counts = empty(blocks, depth, dtype=torch.float64), empty(blocks, dtype=torch.int32)
    launch(
        _sums_kernel,
        (blocks,),
        (codebook, bias, sums, counts, packed.bounds),
        (size, d, int(biased)),
        (depth, rows),
        warps=_WARPS,
        stages=1,
    )
    launch(
        _lengths_kernel,
        (blocks,),
        (codebook, bias, sums, counts, mean, packed.shift, length),
        (size, d, blocks, int(biased)),
        (depth, rows, _BLOCKS),
        warps=_WARPS,
        stages=1,
    )
    outputs = packed.codes, packed.bias, packed.order, packed.rounded, packed.rounded_bias, packed.bounds
    launch(
        _place_kernel,
        (blocks,),
        (codebook, bias, mean, length, *outputs),
        (size, d, int(biased)),
        (depth, rows, compared),
        warps=_WARPS,
        stages=1,
    )
    return packed


def _configs() -> tuple[Compilation, ...]:
    types = {
        "sums_ptr": "*fp64",
        **dict.fromkeys(("counts_ptr", "order_ptr"), "*i32"),
        "rounded_ptr": "*bf16",
        **dict.fromkeys(("V", "D", "blocks", "biased"), "i32"),
    }
    out = []
    for depth in (16, 32, 64, 128, 256):
        rows, compared = _tile(depth)
        values = {"DEPTH": depth, "ROWS": rows, "COMPARED": compared, "BLOCKS": _BLOCKS}
        for kernel in (_sums_kernel, _lengths_kernel, _place_kernel):
            constants = {name: values[name] for name in kernel.arg_names if name in values}
            out.append(
                Compilation(
                    kernel=kernel,
                    tile=f"{rows} codes D={depth}",
                    signature={name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constants},
                    constants=constants,
                    warps=_WARPS,
                    stages=1,
                )
            )
    return tuple(out)


CONFIGS = _configs()
