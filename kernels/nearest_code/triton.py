"""Nearest code on a GPU: a bfloat16 filter of bounded error, then the candidates in float32; never (N, V) scores.

The answer for a row x is the lowest v of the largest score, which is b_v, then fma(x_d, c_vd, score) for d ascending,
in float32; b_v is -|c_v|^2 / 2, summed in float64, or 0 for cosine. The kernels together give exactly that code:

- the filter scores every code on the tensor cores and keeps, of each group of 32 codes, the largest score m. A group's
  scores err by at most e (Cauchy-Schwarz on what the rounding to bfloat16 took from x and from the codes, the sums'
  rounding added), so that only groups with m + e >= max(m - e) can hold the answer;
- the re-rank computes the scores of those groups, one or two a row, in the stated order;
- the exact kernel computes all scores of the rows with more candidates than the filter keeps. Small problems are its.

`packing` prepares the codebook for all three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mars.kernels._triton import ARCHITECTURES, Compilation, cdiv, launch
from mars.kernels.nearest_code import packing
from mars.kernels.nearest_code.packing import Packed

_GROUP, _TILE, _NONE = tl.constexpr(packing.GROUP), tl.constexpr(packing.TILE), tl.constexpr(packing.NONE)
_LARGE, _RATIO = tl.constexpr(packing.LARGE), tl.constexpr(packing.RATIO)
_EXACT_PROGRAMS = 512  # at most; they take turns


@dataclass(frozen=True)
class _FilterTile:
    rows: int
    columns: int  # of one product; a tile is _TILE codes
    warps: int
    stages: int


_WARP_TILES = {  # padded D: tile
    16: _FilterTile(128, 64, 4, 3),
    32: _FilterTile(128, 64, 4, 3),
    64: _FilterTile(128, 64, 8, 3),
    128: _FilterTile(64, 32, 4, 3),
    256: _FilterTile(64, 32, 8, 2),
}
_WARPGROUP_TILES = {  # on compute capability 9.0
    16: _FilterTile(128, 128, 4, 3),
    32: _FilterTile(128, 128, 4, 3),
    64: _FilterTile(128, 128, 4, 3),
    128: _FilterTile(128, 128, 8, 3),
    256: _FilterTile(64, 128, 4, 2),
}


def _filter_tile(depth: int, capability: int) -> _FilterTile:
    return (_WARPGROUP_TILES if capability == 90 else _WARP_TILES)[depth]


_SPLITS = (1, 2, 4, 8, 16)
_RERANK = {"rows": 4, "warps": 4, "stages": 3}
_EXACT = {"rows": 64, "columns": 64, "depth": 16, "warps": 8, "stages": 2}


def search(x: Tensor, packed: Packed) -> Tensor:
    """Return the nearest code of each row, the lowest index on ties.

    x is float32 (N, D), contiguous. A row with a NaN or an infinity gets 0; a code with one, or with a bias beyond
    float32, is never chosen unless all are (then 0). Returns int64 (N,). Nothing waits for the GPU.
    """
    products = len(x) * packed.rounded.numel()
    # Below, launches and memory decide, not arithmetic.
    run = search_exact if packed.size <= 2048 or products <= 1 << 27 else search_filtered
    return run(x, packed)


def search_exact(x: Tensor, packed: Packed) -> Tensor:
    """Do what `search` does, without the filter."""
    ids = torch.empty(len(x), dtype=torch.int64, device=x.device)
    _exact(x, packed, ids, _scratch(x), None)
    return ids


def search_filtered(x: Tensor, packed: Packed, splits: int | None = None) -> Tensor:
    """Do what `search` does, with the filter.

    splits: 1, 2, 4, 8 or 16, the programs that share the codes of a block of rows.
    """
    n, d = x.shape
    ids = torch.empty(n, dtype=torch.int64, device=x.device)
    if n == 0:
        return ids
    depth, tiles = packed.rounded.shape[1], len(packed.bounds)
    interpreted = not x.is_cuda
    tile = _filter_tile(depth, 80 if interpreted else _capability(x.device))
    blocks = cdiv(n, tile.rows)
    splits = splits or _splits(blocks, tiles)
    upper = torch.empty(n, splits, 8, device=x.device)
    place = torch.empty(n, splits, 8, dtype=torch.int32, device=x.device)
    limits = torch.empty(n, splits, 2, device=x.device)
    scratch = _scratch(x)
    listed = torch.empty(n, dtype=torch.int64, device=x.device)
    found = upper, place, limits
    launch(
        _filter_kernel,
        (blocks, splits),
        (x, packed.shift, packed.rounded, packed.rounded_bias, packed.bounds, *found),
        (n, d, tiles, cdiv(tiles, splits)),
        (depth, tile.rows, tile.columns, interpreted),
        warps=tile.warps,
        stages=tile.stages,
    )
    launch(
        _rerank_kernel,
        (cdiv(n, _RERANK["rows"]),),
        (x, packed.codes, packed.bias, packed.order, *found, ids, listed, scratch.count),
        (n, d),
        (splits, _RERANK["rows"]),
        warps=_RERANK["warps"],
        stages=_RERANK["stages"],
    )
    _exact(x, packed, ids, scratch, listed)
    return ids


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _splits(blocks: int, tiles: int) -> int:
    """Return how many splits give about 256 programs with four tiles each or more."""
    wanted = min(cdiv(256, blocks), max(1, tiles // 4))
    return max(s for s in _SPLITS if s <= wanted)


class _Scratch(NamedTuple):
    """What programs of the exact kernel share, int64, zero before it runs but for the count."""

    keys: Tensor  # of each row, the best so far
    done: Tensor  # of each block of rows, the programs that have ended
    count: Tensor  # of rows that are listed


def _scratch(x: Tensor) -> _Scratch:
    n = len(x)
    keys, done = n + n % 2, cdiv(n, _EXACT["rows"])  # so that each part is aligned to 16 bytes
    done += done % 2
    zeros = torch.zeros(keys + done + 1, dtype=torch.int64, device=x.device)
    return _Scratch(zeros, zeros[keys:], zeros[keys + done :])


def _exact(x: Tensor, packed: Packed, ids: Tensor, scratch: _Scratch, listed: Tensor | None) -> None:
    """Launch the exact kernel on all rows or on those listed."""
    n, d = x.shape
    if n == 0:
        return
    blocks, tiles = cdiv(n, _EXACT["rows"]), len(packed.bias) // _EXACT["columns"]
    # Listed rows are few, whatever n is: chunks of 1024 codes give even one block some parallelism.
    each = 16 if listed is not None else max(1, min(16, tiles * blocks // _EXACT_PROGRAMS))
    chunks = cdiv(tiles, each)
    rows = ids if listed is None else listed
    launch(
        _exact_kernel,
        (min(_EXACT_PROGRAMS, blocks * chunks),),
        (x, packed.codes, packed.bias, packed.order, rows, scratch.count, scratch.keys, scratch.done, ids),
        (n, d, tiles, each, chunks),
        (listed is not None, _EXACT["rows"], _EXACT["columns"], _EXACT["depth"]),
        warps=_EXACT["warps"],
        stages=_EXACT["stages"],
    )


@triton.jit
def _maxima(
    x,
    codes_ptr,
    bias_ptr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """(ROWS, 4): the largest scores of COLUMNS codes by group."""
    column, d = FIRST + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    code = tl.load(codes_ptr + (column[None, :] * DEPTH + d[:, None])).to(x.dtype)
    bias = tl.load(bias_ptr + column)
    score = tl.dot(x, code, tl.broadcast_to(bias[None, :], [ROWS, COLUMNS]))
    return tl.max(tl.max(tl.reshape(score, [ROWS, COLUMNS // 8, 4, 2]), axis=3), axis=1)


@triton.jit(do_not_specialize=["N", "D", "tiles", "tiles_each"])
def _filter_kernel(
    x_ptr,
    shift_ptr,
    codes_ptr,
    bias_ptr,
    bounds_ptr,
    upper_ptr,
    place_ptr,
    limits_ptr,
    N,
    D,
    tiles,
    tiles_each,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """For each row and each of the four groups of a tile, over a split's tiles: the two groups of largest m + e.

    upper (N, splits, 4, 2): those m + e; place: their tiles; limits (N, splits, 2): the largest m - e, and the
    third-largest m + e of any of the four, +inf for a row that is not for the filter.
    """
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DEPTH)
    inside = row < N
    x = tl.load(x_ptr + row[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    x -= tl.load(shift_ptr + d)[None, :]
    # 2^-58 covers squares that underflow.
    length = 1.001 * tl.sqrt(tl.sum(x * x, axis=1)) + 3.5e-18
    wild = ~(length < _LARGE)  # or NaN
    x = tl.where(wild[:, None], 0.0, x)
    rounded = x.to(tl.bfloat16)
    lost = x - rounded.to(tl.float32)
    loss = 1.001 * tl.sqrt(tl.sum(lost * lost, axis=1)) + 3.5e-18
    # One factor a row, as the bounds hold _RATIO: with two, the compiler moves e through shared memory.
    length = tl.where(wild, 0.0, tl.maximum(length, loss * (1 / _RATIO)))
    if UPCAST:
        rounded = rounded.to(tl.float32)

    group = tl.arange(0, 4)
    limit = tl.full([ROWS, 4], float("-inf"), tl.float32)
    first = limit
    second = limit
    third = limit
    first_tile = tl.zeros([ROWS, 4], tl.int32)
    second_tile = first_tile
    for tile in range(split * tiles_each, tl.minimum((split + 1) * tiles_each, tiles)):
        start = tl.cast(tile, tl.int64) * _TILE
        tile_codes_ptr, tile_bias_ptr = codes_ptr + start * DEPTH, bias_ptr + start
        m = _maxima(rounded, tile_codes_ptr, tile_bias_ptr, 0, ROWS, COLUMNS, DEPTH)
        for column in tl.static_range(COLUMNS, _TILE, COLUMNS):
            m = tl.maximum(m, _maxima(rounded, tile_codes_ptr, tile_bias_ptr, column, ROWS, COLUMNS, DEPTH))
        bound_ptr = bounds_ptr + tile * 8 + group
        e = length[:, None] * tl.load(bound_ptr)[None, :] + tl.load(bound_ptr + 4)[None, :]
        limit = tl.maximum(limit, m - e)
        m += e
        third = tl.maximum(third, tl.minimum(second, m))
        second_tile = tl.where(m > first, first_tile, tl.where(m > second, tile, second_tile))
        second = tl.maximum(second, tl.minimum(first, m))
        first_tile = tl.where(m > first, tile, first_tile)
        first = tl.maximum(first, m)

    out = row * tl.num_programs(1) + split
    slot = out[:, None] * 8 + group[None, :] * 2
    mask = inside[:, None] & (group >= 0)[None, :]
    tl.store(upper_ptr + slot, first, mask=mask)
    tl.store(upper_ptr + slot + 1, second, mask=mask)
    tl.store(place_ptr + slot, first_tile, mask=mask)
    tl.store(place_ptr + slot + 1, second_tile, mask=mask)
    tl.store(limits_ptr + out * 2, tl.max(limit, axis=1), mask=inside)
    tl.store(limits_ptr + out * 2 + 1, tl.where(wild, float("inf"), tl.max(third, axis=1)), mask=inside)


@triton.jit(do_not_specialize=["N", "D"], do_not_specialize_on_alignment=["count_ptr"])
def _rerank_kernel(
    x_ptr,
    codes_ptr,
    bias_ptr,
    order_ptr,
    upper_ptr,
    place_ptr,
    limits_ptr,
    ids_ptr,
    listed_ptr,
    count_ptr,
    N,
    D,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The best code of each row's candidate groups; rows that may have more candidates are listed, in any order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    split = row[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    limit = tl.max(tl.load(limits_ptr + split * 2, mask=inside[:, None], other=0.0), axis=1)
    third = tl.max(tl.load(limits_ptr + split * 2 + 1, mask=inside[:, None], other=float("-inf")), axis=1)
    more = inside & ~(third < limit)

    slot = tl.arange(0, SPLITS * 8)
    at = row[:, None] * (SPLITS * 8) + slot[None, :]
    upper = tl.load(upper_ptr + at, mask=inside[:, None], other=float("-inf"))
    groups = tl.load(place_ptr + at, mask=inside[:, None], other=0) * 4 + (slot // 2 % 4)[None, :]
    live = (upper >= limit[:, None]) & (inside & ~more)[:, None]
    lane = tl.arange(0, _GROUP)
    best = tl.full([ROWS, _GROUP], float("-inf"), tl.float32)
    index = tl.full([ROWS, _GROUP], _NONE, tl.int32)
    for _ in range(tl.max(tl.sum(live.to(tl.int32), axis=1))):
        chosen = tl.min(tl.where(live, slot[None, :], SPLITS * 8), axis=1)
        is_chosen = slot[None, :] == chosen[:, None]
        live = live & ~is_chosen
        group = tl.sum(tl.where(is_chosen, groups, 0), axis=1).to(tl.int64)
        some = (chosen < SPLITS * 8)[:, None] & (lane >= 0)[None, :]
        position = group[:, None] * _GROUP + lane[None, :]
        score = tl.load(bias_ptr + position, mask=some, other=float("-inf"))
        code_ptr = codes_ptr + group[:, None] * _GROUP * D + lane[None, :]
        for d in tl.range(0, D, loop_unroll_factor=4):
            value = tl.load(x_ptr + row[:, None] * D + d, mask=inside[:, None], other=0.0)
            score = tl.fma(value, tl.load(code_ptr + d * _GROUP, mask=some, other=0.0), score)
        code = tl.load(order_ptr + position, mask=some, other=_NONE)
        better = (score > best) | ((score == best) & (code < index))
        best = tl.where(better, score, best)
        index = tl.where(better, code, index)
    found = tl.min(tl.where(best == tl.max(best, axis=1)[:, None], index, _NONE), axis=1)
    tl.store(ids_ptr + row, tl.where(found == _NONE, 0, found).to(tl.int64), mask=inside & ~more)
    listed = tl.atomic_add(
        count_ptr + tl.zeros([ROWS], tl.int32), tl.full([ROWS], 1, tl.int64), mask=more, sem="relaxed"
    )
    tl.store(listed_ptr + listed, row, mask=more)


@triton.jit
def _key(score, code):
    """int64 > 0, larger for a larger score (-0 is 0) and among equal scores for a lower code."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((ordered.to(tl.int64) + 2147483648) << 31) | (code ^ _NONE).to(tl.int64)


@triton.jit(
    do_not_specialize=["N", "D", "tiles", "tiles_each", "chunks"],
    do_not_specialize_on_alignment=["count_ptr", "done_ptr"],
)
def _exact_kernel(
    x_ptr,
    codes_ptr,
    bias_ptr,
    order_ptr,
    listed_ptr,
    count_ptr,
    key_ptr,
    done_ptr,
    ids_ptr,
    N,
    D,
    tiles,
    tiles_each,
    chunks,
    LISTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """All scores of all rows or of the listed ones. A program takes a block of rows and a chunk of the codes at a time;
    the last to end of a block's programs writes its ids.

    The sum of an ieee `tl.dot` runs over its operands' columns in order, a fused multiply-add each.
    """
    count = N
    if LISTED:
        count = tl.load(count_ptr)
    column = tl.arange(0, COLUMNS)
    items = tl.cdiv(count, ROWS).to(tl.int64) * chunks
    for item in range(tl.program_id(0).to(tl.int64), items, tl.num_programs(0)):
        block = tl.cast(item // chunks, tl.int64)
        chunk = (item % chunks).to(tl.int32)
        place = block * ROWS + tl.arange(0, ROWS)
        inside = place < count
        row = place
        if LISTED:
            row = tl.load(listed_ptr + place, mask=inside, other=0)
        best = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
        index = tl.full([ROWS, COLUMNS], _NONE, tl.int32)
        for tile in range(chunk * tiles_each, tl.minimum((chunk + 1) * tiles_each, tiles)):
            start = tl.cast(tile, tl.int64) * COLUMNS
            score = tl.broadcast_to(tl.load(bias_ptr + start + column)[None, :], [ROWS, COLUMNS])
            code_ptr = codes_ptr + start * D + (column // _GROUP * _GROUP * D + column % _GROUP)[None, :]
            for first in range(0, D, DEPTH):
                d = first + tl.arange(0, DEPTH)
                x = tl.load(x_ptr + row[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
                x = tl.where(tl.abs(x) < float("inf"), x, float("nan"))
                code = tl.load(code_ptr + d[:, None] * _GROUP, mask=(d < D)[:, None], other=0.0)
                score = tl.dot(x, code, score, input_precision="ieee")
            code = tl.broadcast_to(tl.load(order_ptr + start + column)[None, :], [ROWS, COLUMNS])
            better = (score > best) | ((score == best) & (code < index))
            best = tl.where(better, score, best)
            index = tl.where(better, code, index)
        largest = tl.max(best, axis=1)
        index_of_largest = tl.min(tl.where(best == largest[:, None], index, _NONE), axis=1)
        tl.atomic_max(key_ptr + place, _key(largest, index_of_largest), mask=inside, sem="relaxed")
        tl.debug_barrier()
        if tl.atomic_add(done_ptr + block, 1) == chunks - 1:
            key = tl.load(key_ptr + place, mask=inside, other=0, volatile=True)
            code = (key & _NONE) ^ _NONE
            tl.store(ids_ptr + row, tl.where(code == _NONE, 0, code), mask=inside)


def _configs() -> tuple[Compilation, ...]:
    out = []
    for depth in _WARP_TILES:
        more = max(0, depth - 32) / 32  # the tensor cores' part of the loop grows
        limits = {80: 4.5 + more, 89: 6.0 + more, 90: 3.0 + more / 2, 120: 6.0 + more}
        tiles: dict[_FilterTile, list[int]] = {}
        for architecture in ARCHITECTURES:
            tiles.setdefault(_filter_tile(depth, architecture), []).append(architecture)
        for tile, architectures in tiles.items():
            out.append(
                Compilation(
                    kernel=_filter_kernel,
                    tile=f"{tile.rows}x{tile.columns} D={depth}",
                    signature={
                        **dict.fromkeys(
                            ("x_ptr", "shift_ptr", "bias_ptr", "bounds_ptr", "upper_ptr", "limits_ptr"), "*fp32"
                        ),
                        "codes_ptr": "*bf16",
                        "place_ptr": "*i32",
                        **dict.fromkeys(("N", "D", "tiles", "tiles_each"), "i32"),
                    },
                    constants={"DEPTH": depth, "ROWS": tile.rows, "COLUMNS": tile.columns, "UPCAST": False},
                    warps=tile.warps,
                    stages=tile.stages,
                    architectures=tuple(architectures),
                    mma="warpgroup",
                    depth=depth,
                    instructions_per_score={a: limits[a] for a in architectures},
                )
            )
    out += [
        Compilation(
            kernel=_rerank_kernel,
            tile=f"{_RERANK['rows']} rows, {splits} splits",
            signature={
                **dict.fromkeys(("x_ptr", "codes_ptr", "bias_ptr", "upper_ptr", "limits_ptr"), "*fp32"),
                **dict.fromkeys(("order_ptr", "place_ptr"), "*i32"),
                **dict.fromkeys(("ids_ptr", "listed_ptr", "count_ptr"), "*i64"),
                **dict.fromkeys(("N", "D"), "i32"),
            },
            constants={"SPLITS": splits, "ROWS": _RERANK["rows"]},
            warps=_RERANK["warps"],
            stages=_RERANK["stages"],
        )
        for splits in _SPLITS
    ]
    out += [
        Compilation(
            kernel=_exact_kernel,
            tile=f"{_EXACT['rows']}x{_EXACT['columns']} {'listed' if listed else 'all'} rows",
            signature={
                **dict.fromkeys(("x_ptr", "codes_ptr", "bias_ptr"), "*fp32"),
                "order_ptr": "*i32",
                **dict.fromkeys(("listed_ptr", "count_ptr", "key_ptr", "done_ptr", "ids_ptr"), "*i64"),
                **dict.fromkeys(("N", "D", "tiles", "tiles_each", "chunks"), "i32"),
            },
            constants={
                "LISTED": listed,
                "ROWS": _EXACT["rows"],
                "COLUMNS": _EXACT["columns"],
                "DEPTH": _EXACT["depth"],
            },
            warps=_EXACT["warps"],
            stages=_EXACT["stages"],
            in_order=True,
        )
        for listed in (False, True)
    ]
    return tuple(out)


CONFIGS = _configs()
