"""Scale-causal attention on a GPU: FlashAttention-2 (Dao 2023, arXiv:2307.08691) with a bound per row for a mask.

Row i sees the keys before `kv_end[i]`, the end of its own scale; key j is seen by the queries from `q_start[j]`, the
start of its scale. Each loop runs without a mask as far as all rows of its tile agree and with one after that.

With `head_scale` the scores are g_h cos(q, k): the products of the raw q and k times 1 / |q| and 1 / |k|, so that no
normalised copy is written. Backwards, for q^ = q / |q| and the gradient u of q^: dq = (u - q^ (q^ . u)) / |q|.

Letters: B batch, H heads, L tokens, D values per head; scores are kept in units of log 2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mars.kernels._triton import Compilation, cdiv, launch
from mars.kernels.scale_causal_attention.heads import TRITON_SIZES, empty_like_heads
from mars.kernels.scale_causal_attention.reference import kv_end as kv_end_of

_EPS: tl.constexpr = tl.constexpr(1e-12)  # torch.nn.functional.normalize's
_LOW: tl.constexpr = tl.constexpr(-1e20)  # below any score; finite, since a factor of 0 would make NaN of -inf
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(H, L, BLOCK: tl.constexpr):
    """Batch, head and first token of this program; the last tokens, which see the most keys, come first."""
    blocks = tl.cdiv(L, BLOCK)
    head = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks
    return (head // H).to(tl.int64), (head % H).to(tl.int64), block * BLOCK


@triton.jit
def _load(base, first, stride, L, D: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    """(ROWS, D) of a matrix whose rows lie `stride` apart; zeros from row L on."""
    rows = tl.arange(0, ROWS)
    pointers = base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + tl.arange(0, D)[None, :])
    x = tl.load(pointers, mask=rows[:, None] < L - first, other=0.0) if MASKED else tl.load(pointers)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _store(base, first, stride, x, L, D: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    pointers = base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + tl.arange(0, D)[None, :])
    tl.store(pointers, x.to(base.dtype.element_ty), mask=rows[:, None] < L - first)


@triton.jit
def _inverse_norm(x):
    x = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), _EPS)


@triton.jit
def _through_norm(u, x):
    """Gradient of x from the gradient u of x / |x|, and their product, the gradient of a factor on x / |x|."""
    x = x.to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1))
    inverse = 1.0 / tl.maximum(norm, _EPS)
    unit = x * inverse[:, None]
    along = tl.sum(unit * u, 1)
    projected = tl.where(norm > _EPS, along, 0.0)
    return (u - unit * projected[:, None]) * inverse[:, None], along


@triton.jit
def _attend(
    q, k_base, v_base, k_n, v_n, acc, shift, l, factor, sign, lo, hi, kv_end, L,
    D: tl.constexpr, BLOCK_N: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for start in range(lo, hi, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = _load(k_base, start, k_n, L, D, BLOCK_N, MASKED, UPCAST)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if NORM:
            s *= (_inverse_norm(k) * sign)[None, :]
        if MASKED:
            visible = cols[None, :] < kv_end[:, None]
            s = tl.where(visible, s, _LOW)
        new = tl.maximum(shift, tl.max(s, 1) * factor)
        s = s * factor[:, None] - new[:, None]
        if MASKED:
            s = tl.where(visible, s, -float("inf"))
        p = tl.exp2(s)
        alpha = tl.exp2(shift - new)
        l = l * alpha + tl.sum(p, 1)
        v = _load(v_base, start, v_n, L, D, BLOCK_N, MASKED, UPCAST)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        shift = new
    return acc, shift, l


@triton.jit(do_not_specialize=("H", "L"))
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, q_inverse_ptr, k_inverse_ptr, gain_ptr, kv_end_ptr, scale, H, L,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NORM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    b, h, first = _place(H, L, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    flat = (b * H + h) * L
    kv_end = tl.load(kv_end_ptr + tl.minimum(rows, L - 1))
    agreed = tl.load(kv_end_ptr + first) // BLOCK_N * BLOCK_N
    end = tl.load(kv_end_ptr + tl.minimum(first + BLOCK_M, L) - 1)
    k_base, v_base = k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h

    q = _load(q_ptr + b * q_b + h * q_h, first, q_n, L, D, BLOCK_M, True, UPCAST)
    factor = tl.full([BLOCK_M], _LOG2_E, tl.float32) * scale
    sign = 1.0
    if NORM:
        gain = tl.load(gain_ptr + h)
        sign = tl.where(gain < 0, -1.0, 1.0)
        inverse = _inverse_norm(q)
        factor *= tl.abs(gain) * inverse
        k = _load(k_base, first, k_n, L, D, BLOCK_M, True, UPCAST)
        tl.store(q_inverse_ptr + flat + rows, inverse, mask=rows < L)
        tl.store(k_inverse_ptr + flat + rows, _inverse_norm(k), mask=rows < L)

    shift = tl.full([BLOCK_M], _LOW, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    acc, shift, l = _attend(
        q, k_base, v_base, k_n, v_n, acc, shift, l, factor, sign, 0, agreed, kv_end, L, D, BLOCK_N, NORM, False, UPCAST
    )
    acc, shift, l = _attend(
        q, k_base, v_base, k_n, v_n, acc, shift, l, factor, sign, agreed, end, kv_end, L, D, BLOCK_N, NORM, True, UPCAST
    )
    _store(o_ptr + (b * L * H + h) * D, first, H * D, acc / l[:, None], L, D, BLOCK_M)
    tl.store(lse_ptr + flat + rows, shift + tl.log2(l), mask=rows < L)


@triton.jit
def _accumulate_dq(
    q, do, k_base, v_base, k_n, v_n, k_inverse, acc, lse, delta, factor, sign, lo, hi, kv_end, L,
    D: tl.constexpr, BLOCK_N: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for start in range(lo, hi, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = _load(k_base, start, k_n, L, D, BLOCK_N, MASKED, UPCAST)
        v = _load(v_base, start, v_n, L, D, BLOCK_N, MASKED, UPCAST)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if NORM:
            inverse = tl.load(k_inverse + cols, mask=cols < L, other=0.0)
            s *= (inverse * sign)[None, :]
        s = s * factor[:, None] - lse[:, None]
        if MASKED:
            s = tl.where(cols[None, :] < kv_end[:, None], s, -float("inf"))
        p = tl.exp2(s)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        if NORM:
            ds *= inverse[None, :]
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=("H", "L"))
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, q_inverse_ptr, k_inverse_ptr, gain_ptr, kv_end_ptr,
    dq_ptr, delta_ptr, dgain_ptr, scale, H, L,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NORM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq; for `_dkdv_kernel`, delta = o . do of each row; and each row's share of the gradient of its head's gain."""
    b, h, first = _place(H, L, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    flat = (b * H + h) * L
    kv_end = tl.load(kv_end_ptr + tl.minimum(rows, L - 1))
    agreed = tl.load(kv_end_ptr + first) // BLOCK_N * BLOCK_N
    end = tl.load(kv_end_ptr + tl.minimum(first + BLOCK_M, L) - 1)
    k_base, v_base = k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h

    o = _load(o_ptr + (b * L * H + h) * D, first, H * D, L, D, BLOCK_M, True, UPCAST)
    do = _load(do_ptr + b * do_b + h * do_h, first, do_n, L, D, BLOCK_M, True, UPCAST)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + flat + rows, delta, mask=rows < L)
    lse = tl.load(lse_ptr + flat + rows, mask=rows < L, other=0.0)
    q = _load(q_ptr + b * q_b + h * q_h, first, q_n, L, D, BLOCK_M, True, UPCAST)
    factor = tl.full([BLOCK_M], _LOG2_E, tl.float32) * scale
    sign = 1.0
    if NORM:
        gain = tl.load(gain_ptr + h)
        sign = tl.where(gain < 0, -1.0, 1.0)
        factor *= tl.abs(gain) * tl.load(q_inverse_ptr + flat + rows, mask=rows < L, other=0.0)
    k_inverse = k_inverse_ptr + flat

    acc = tl.zeros([BLOCK_M, D], tl.float32)
    acc = _accumulate_dq(
        q, do, k_base, v_base, k_n, v_n, k_inverse, acc, lse, delta, factor, sign, 0, agreed, kv_end, L,
        D, BLOCK_N, NORM, False, UPCAST,
    )  # fmt: skip
    acc = _accumulate_dq(
        q, do, k_base, v_base, k_n, v_n, k_inverse, acc, lse, delta, factor, sign, agreed, end, kv_end, L,
        D, BLOCK_N, NORM, True, UPCAST,
    )  # fmt: skip
    acc *= scale
    if NORM:
        q = _load(q_ptr + b * q_b + h * q_h, first, q_n, L, D, BLOCK_M, True, UPCAST)
        acc, along = _through_norm(acc, q)
        acc *= gain
        tl.store(dgain_ptr + flat + rows, along, mask=rows < L)
    _store(dq_ptr + (b * L * H + h) * D, first, H * D, acc, L, D, BLOCK_M)


@triton.jit
def _accumulate_dkdv(
    k, v, q_base, do_base, q_n, do_n, lse_ptr, delta_ptr, q_inverse, dk, dv, factor, gain, q_start, lo, hi, L,
    D: tl.constexpr, BLOCK_M: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for start in range(lo, hi, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = _load(q_base, start, q_n, L, D, BLOCK_M, True, UPCAST)
        do = _load(do_base, start, do_n, L, D, BLOCK_M, True, UPCAST)
        lse = tl.load(lse_ptr + rows, mask=rows < L, other=-_LOW)  # no row, no weight
        delta = tl.load(delta_ptr + rows, mask=rows < L, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * factor[:, None]
        if NORM:
            inverse = tl.load(q_inverse + rows, mask=rows < L, other=0.0)
            s *= (inverse * gain)[None, :]
        s -= lse[None, :]
        if MASKED:
            s = tl.where(rows[None, :] >= q_start[:, None], s, -float("inf"))
        p = tl.exp2(s)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        if NORM:
            ds *= inverse[None, :]
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=("H", "L"))
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, q_inverse_ptr, gain_ptr, q_start_ptr, dk_ptr, dv_ptr,
    scale, H, L,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NORM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, BLOCK_N)
    head = tl.program_id(0) // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_N
    cols = first + tl.arange(0, BLOCK_N)
    flat = (b * H + h) * L
    q_start = tl.load(q_start_ptr + cols, mask=cols < L, other=L)
    begin = tl.min(q_start, 0) // BLOCK_M * BLOCK_M
    agreed = tl.cdiv(tl.max(q_start, 0), BLOCK_M) * BLOCK_M
    q_base, do_base = q_ptr + b * q_b + h * q_h, do_ptr + b * do_b + h * do_h

    k = _load(k_ptr + b * k_b + h * k_h, first, k_n, L, D, BLOCK_N, True, UPCAST)
    v = _load(v_ptr + b * v_b + h * v_h, first, v_n, L, D, BLOCK_N, True, UPCAST)
    factor = tl.full([BLOCK_N], _LOG2_E, tl.float32) * scale
    gain = 1.0
    if NORM:
        gain = tl.load(gain_ptr + h)
        factor *= _inverse_norm(k)

    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    dk, dv = _accumulate_dkdv(
        k, v, q_base, do_base, q_n, do_n, lse_ptr + flat, delta_ptr + flat, q_inverse_ptr + flat, dk, dv, factor, gain,
        q_start, begin, tl.minimum(agreed, L), L, D, BLOCK_M, NORM, True, UPCAST,
    )  # fmt: skip
    dk, dv = _accumulate_dkdv(
        k, v, q_base, do_base, q_n, do_n, lse_ptr + flat, delta_ptr + flat, q_inverse_ptr + flat, dk, dv, factor, gain,
        q_start, agreed, L, L, D, BLOCK_M, NORM, False, UPCAST,
    )  # fmt: skip
    dk *= scale * gain
    if NORM:
        k = _load(k_ptr + b * k_b + h * k_h, first, k_n, L, D, BLOCK_N, True, UPCAST)
        dk, _ = _through_norm(dk, k)
    _store(dk_ptr + (b * L * H + h) * D, first, H * D, dk, L, D, BLOCK_N)
    _store(dv_ptr + (b * L * H + h) * D, first, H * D, dv, L, D, BLOCK_N)


class Tile(NamedTuple):
    """A tile is the queries and keys of a step, the warps of a program, and the steps in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


_TILES = {  # bits of a value and D: of the forward, the dq and the dkdv kernel; larger ones spill on some GPU
    (16, 16): (Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), Tile(32, 64, 4, 3)),
    (16, 32): (Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), Tile(32, 64, 4, 3)),
    (16, 64): (Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(32, 64, 4, 3)),
    (16, 128): (Tile(64, 32, 4, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    (32, 16): (Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (32, 32): (Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (32, 64): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (32, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}


def tile(kernel: str, D: int, bits: int) -> Tile:
    """Return the tile of the "forward", "dq" or "dkdv" kernel for heads of D values of 16 or 32 bits."""
    return _TILES[bits, D][("forward", "dq", "dkdv").index(kernel)]


def forward(
    q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the attention (B, H, L, D), laid out as (B, L, H, D), and what `backward` needs: lse, 1 / |q| and 1 / |k|.

    Without `head_scale` the last two are empty.
    """
    q, k, v = _readable(q), _readable(k), _readable(v)
    B, H, L, _ = q.shape
    out = empty_like_heads(q)
    lse = q.new_empty(B, H, L, dtype=torch.float32)
    q_inverse, k_inverse = (q.new_empty((B, H, L) if head_scale is not None else 0, dtype=torch.float32) for _ in "qk")
    kv_end, _ = _bounds(tuple(lengths), q.device)
    _launch(
        "forward", q,
        (q, k, v, out, lse, q_inverse, k_inverse, _gain(head_scale, lse), kv_end),
        scale, (q, k, v), head_scale is not None,
    )  # fmt: skip
    return out, lse, q_inverse, k_inverse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, out: Tensor, lse: Tensor,
    q_inverse: Tensor, k_inverse: Tensor, lengths: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, laid out as (B, L, H, D), and of `head_scale` (empty without it)."""
    do, q, k, v = _readable(do), _readable(q), _readable(k), _readable(v)
    norm = head_scale is not None
    gain = _gain(head_scale, lse)
    dq, dk, dv = empty_like_heads(q), empty_like_heads(q), empty_like_heads(q)
    delta, dgain = torch.empty_like(lse), torch.empty_like(lse) if norm else lse.new_empty(0)
    kv_end, q_start = _bounds(tuple(lengths), q.device)
    _launch(
        "dq", q, (q, k, v, out, do, lse, q_inverse, k_inverse, gain, kv_end, dq, delta, dgain),
        scale, (q, k, v, do), norm,
    )  # fmt: skip
    _launch("dkdv", q, (q, k, v, do, lse, delta, q_inverse, gain, q_start, dk, dv), scale, (q, k, v, do), norm)
    return dq, dk, dv, dgain.sum((0, 2)).to(head_scale.dtype) if head_scale is not None else dgain


def _readable(x: Tensor) -> Tensor:
    """Return x, or a copy where the kernels cannot read it: a row is contiguous, and a tile's offsets fit 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(2) < 2**24 else x.contiguous()


def _gain(head_scale: Tensor | None, like: Tensor) -> Tensor:
    return like if head_scale is None else head_scale.float().contiguous()


@lru_cache(maxsize=64)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return kv_end and q_start, int32 (L,)."""
    kv_end = kv_end_of(lengths)
    q_start = kv_end - torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int32), torch.tensor(lengths))
    return kv_end.to(device), q_start.to(device)


_KERNELS = {"forward": _forward_kernel, "dq": _dq_kernel, "dkdv": _dkdv_kernel}


def _launch(
    name: str, q: Tensor, pointers: tuple[Tensor, ...], scale: float, strided: tuple[Tensor, ...], norm: bool
) -> None:
    B, H, L, D = q.shape
    queries, keys, warps, stages = tile(name, D, q.element_size() * 8)
    programs = B * H * cdiv(L, keys if name == "dkdv" else queries)
    if programs == 0:
        return
    # Triton's interpreter computes with the bit patterns of bfloat16.
    upcast = q.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    numbers: list[float] = [scale, H, L]
    for x in strided:
        numbers += x.stride()[:3]
    constants = D, queries, keys, norm, upcast
    launch(_KERNELS[name], (programs,), pointers, tuple(numbers), constants, warps=warps, stages=stages)


_TYPES = {
    "lse_ptr": "*fp32", "q_inverse_ptr": "*fp32", "k_inverse_ptr": "*fp32", "gain_ptr": "*fp32", "delta_ptr": "*fp32",
    "dgain_ptr": "*fp32", "kv_end_ptr": "*i32", "q_start_ptr": "*i32", "scale": "fp32", "H": "i32", "L": "i32",
}  # fmt: skip


def _compilations() -> Iterator[Compilation]:
    """Yield every kernel at every size; float16 compiles to what bfloat16 does."""
    for (name, kernel), D, (dtype, bits), norm in product(
        _KERNELS.items(), TRITON_SIZES, (("bf16", 16), ("fp32", 32)), (False, True)
    ):
        queries, keys, warps, stages = tile(name, D, bits)
        constants = {"D": D, "BLOCK_M": queries, "BLOCK_N": keys, "NORM": norm, "UPCAST": False}
        strides = [a for a in kernel.arg_names if a.endswith(("_b", "_h", "_n"))]
        types = (
            {a: f"*{dtype}" for a in kernel.arg_names if a.endswith("_ptr")} | dict.fromkeys(strides, "i32") | _TYPES
        )
        yield Compilation(
            kernel=kernel,
            tile=f"{queries}x{keys} D={D} {dtype}{' normalised' if norm else ''}",
            signature={a: types[a] for a in kernel.arg_names if a not in constants},
            constants=constants,
            warps=warps,
            stages=stages,
            multiples_of_16=tuple(strides),
            mma="warpgroup" if bits == 16 else "none",
        )


CONFIGS = tuple(_compilations())
