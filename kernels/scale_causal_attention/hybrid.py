"""This is the attention of a CPU: PyTorch's fused forward, or matrix products where a backward will follow.

The fused forward reads q, k and v once and keeps its scores in float32, in bfloat16 too. Its backward is the slow half,
in bfloat16 above all, where it does not reach the matrix units. Matrix products do (Dao et al. 2022, arXiv:2205.14135,
appendix B.2): P = softmax(S), dV = P' dO, dP = dO V', dS = P (dP - sum P dP), dQ = dS K, dK = dS' Q. S and its softmax
are in float32, since scores rounded to bfloat16 would be off by 0.25 at the sharpest that a VAR learns.

A processor without products in bfloat16 has the backward done in float32, which there is five to ten times as fast.

P is kept from the forward where it is small, and otherwise computed again. The normalisation of q and k is part of both
passes, done on what lies in the cache: for x^ = x / |x| and the gradient u of x^, dx = (u - x^ (x^ . u)) / |x|.

What is not finite in a finer scale would pass the masks inside a group of scales. It is looked for in the results, and
if it is there they are computed again without masks, each scale by itself.

Letters: B batch, H heads, L tokens, D values per head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mars.kernels.scale_causal_attention import backends, reference
from mars.kernels.scale_causal_attention.heads import empty_like_heads

KEPT = 1 << 26  # bytes of P, at most, that a call keeps for its backward
_SCORES = {4: 1 << 20, 2: 1 << 22}  # held at a time, by bytes of a value: a product in bfloat16 costs more to start
_EPS = 1e-12  # torch.nn.functional.normalize's


class Processor(NamedTuple):
    """This is what decides which attention is fast on a CPU."""

    amx: bool  # multiplies tiles of bfloat16
    bfloat16: bool  # multiplies bfloat16 at all, other than by way of float32


def _processor() -> Processor:
    found = torch.cpu.get_capabilities()
    amx = bool(found.get("amx_bf16"))
    return Processor(amx, amx or bool(found.get("avx512_bf16")) or bool(found.get("bf16")))


PROCESSOR = _processor()  # asked once: a choice by timing would make two runs of one seed differ


def pays(dtype: torch.dtype, groups: int, normalised: bool) -> bool:
    """Return whether this is the fastest attention of the processor, or else "grouped", forward and backward.

    Measured with AMX (a Xeon): where there are several groups of scales, or a normalisation to be fused. Without (EPYC,
    Zen 3 and 5): several groups and, by far, bfloat16 of any kind, whose backward of PyTorch's own is slow.
    """
    if dtype == torch.float16:  # products in it are slow everywhere
        return False
    if groups > 1 or (dtype == torch.bfloat16 and not PROCESSOR.amx):
        return True
    # Compiled, only this one keeps what is not finite where it belongs.
    return normalised and (PROCESSOR.amx or torch.compiler.is_compiling())


def widened(q: Tensor) -> bool:
    """Return whether the products are computed in float32, since the processor has none in the dtype of q."""
    return q.dtype == torch.bfloat16 and not PROCESSOR.bfloat16


def saved_numel(q: Tensor, lengths: Sequence[int]) -> int:
    """Count the values of P that `forward` keeps: only in 16 bits, and none if they take more than `KEPT` bytes."""
    values = q.shape[0] * q.shape[1] * sum((end - start) * end for start, end, _ in backends.groups(lengths))
    return values if q.element_size() == 2 and 2 * values <= KEPT and not widened(q) else 0


def forward(
    q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """Return (B, H, L, D), laid out as (B, L, H, D), and P for `backward`, empty if not wanted or not small."""
    out = empty_like_heads(q)
    weights = q.new_empty(saved_numel(q, lengths) if keep else 0)
    if len(weights) == 0:
        if head_scale is not None:
            q, k = reference.normalize(q, k, head_scale)
        out.copy_(backends.grouped(q, k, v, lengths, scale))
    else:
        _forward(q, k, v, head_scale, lengths, scale, out, weights)
    if (rows := backends.hiding(lengths)) and not backends.finite(out[:, :, :rows]):
        if head_scale is not None and len(weights):
            q, k = reference.normalize(q, k, head_scale)
        out.copy_(backends.per_scale(q, k, v, lengths, scale))
    return out, weights


def _forward(
    q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float,
    out: Tensor, weights: Tensor,
) -> None:  # fmt: skip
    """Fill `out` and `weights`."""
    slabs, done = Slabs(q, backends.groups(lengths)), 0
    with torch.autocast("cpu", enabled=False):
        for part in slabs:
            qh, kh, vh = slabs.of(part, q, k, v)
            if head_scale is not None:
                qh, kh = _Normalized(qh, head_scale[part[1]]).value, _Normalized(kh).value
            outh = torch.empty_like(vh)
            for start, end, S in slabs.softmax(qh, kh, scale):
                P = weights[done : done + S.numel()].view(S.shape).copy_(S)
                outh[:, start:end] = torch.bmm(P, vh[:, :end])
                done += S.numel()
            out[part] = outh.view(out[part].shape)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_scale: Tensor | None,
    weights: Tensor,
    lengths: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each (B, H, L, D), and of head_scale (empty without it)."""
    if widened(q):
        dtype = q.dtype
        do, q, k, v, weights = (x.float() for x in (do, q, k, v, weights))
        dq, dk, dv, dgain = backward(do, q, k, v, head_scale, weights, lengths, scale)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), dgain
    gradients = _backward(do, q, k, v, head_scale, weights, backends.groups(lengths), scale)
    if backends.hiding(lengths) and not backends.finite(*gradients[:3]):
        return _backward(do, q, k, v, head_scale, weights[:0], backends.groups(lengths, least=1), scale)
    return gradients


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, weights: Tensor,
    groups: list[backends.Group], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    dgain = q.new_zeros(0 if head_scale is None else q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
    if q.numel() == 0:
        return dq, dk, dv, dgain
    slabs, done = Slabs(q, groups), 0
    products = q.new_empty(slabs.size)
    with torch.autocast("cpu", enabled=False):
        for part in slabs:
            doh, qh, kh, vh = slabs.of(part, do, q, k, v)
            dqh, dkh, dvh = (x[part].flatten(0, 1) for x in (dq, dk, dv))
            exact = qh, kh
            if head_scale is not None:
                q_hat, k_hat = _Normalized(qh, head_scale[part[1]]), _Normalized(kh)
                exact = q_hat.value, k_hat.value
                qh, kh = exact[0].to(q.dtype), exact[1].to(q.dtype)
            steps = slabs.cut(weights[done:], len(qh)) if len(weights) else slabs.softmax(*exact, scale)
            for start, end, S in steps:
                P = S.to(q.dtype)
                dS = torch.bmm(doh[:, start:end], vh[:, :end].mT, out=products[: S.numel()].view(S.shape))
                torch._softmax_backward_data(dS, P, -1, q.dtype, grad_input=dS)
                beta = int(end < q.shape[2])  # the last group comes first and sees every key: it writes, the rest add
                dqh[:, start:end].baddbmm_(dS, kh[:, :end], beta=0, alpha=scale)
                dkh[:, :end].baddbmm_(dS.mT, qh[:, start:end], beta=beta, alpha=scale)
                dvh[:, :end].baddbmm_(P.mT, doh[:, start:end], beta=beta)
                done += S.numel()
            if head_scale is not None:
                dgain[part[1]] += q_hat.backward_(dqh)
                k_hat.backward_(dkh)
    return dq, dk, dv, dgain if head_scale is None else dgain.to(head_scale.dtype)


class _Normalized:
    """This is x / |x| of (n, L, D) in float32 or better, times a gain per head; n is a multiple of the heads."""

    def __init__(self, x: Tensor, gain: Tensor | None = None) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        self.unit = x / self.norm.clamp_min(_EPS)
        self.heads = 1 if gain is None else len(gain)
        self.gain = None if gain is None else gain.to(x.dtype).repeat(len(x) // len(gain))[:, None, None]
        self.value = self.unit if self.gain is None else self.unit * self.gain

    def backward_(self, u: Tensor) -> Tensor:
        """Turn the gradient of `value` into that of x, in place; returns that of the gain."""
        exact = u.to(self.unit.dtype)
        along = (self.unit * exact).sum(-1, keepdim=True)
        factor = self.norm.clamp_min(_EPS).reciprocal_()
        if self.gain is not None:
            factor *= self.gain
        projected = torch.where(self.norm > _EPS, along, 0)
        u.copy_(torch.addcmul(exact, self.unit, projected, value=-1).mul_(factor))
        return along.view(-1, self.heads, along.shape[1]).sum((0, 2))


_Step = tuple[int, int, Tensor]  # a group's queries start:end, which see the keys :end, and (heads, queries, keys)


class Slabs:
    """This cuts tensors (B, H, ...) into parts of a few heads, whose scores stay in the cache."""

    def __init__(self, q: Tensor, groups: list[backends.Group]) -> None:
        self.groups = groups[::-1]
        most = max((end - start) * end for start, end, _ in self.groups)
        heads = max(1, _SCORES.get(q.element_size(), 1 << 18) // most)
        self.shape = q.shape[:2]
        # Products in bfloat16 want few calls on contiguous matrices; those in float32 take them as they lie.
        self.contiguous = q.element_size() == 2
        self.samples = max(1, heads // q.shape[1]) if self.contiguous else 1
        self.heads = min(heads, q.shape[1])
        self.size = most * self.heads * self.samples
        self.scores = q.new_empty(self.size, dtype=torch.promote_types(q.dtype, torch.float32))

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        B, H = self.shape
        for b in range(0, B, self.samples):
            for h in range(0, H, self.heads):
                yield slice(b, b + self.samples), slice(h, h + self.heads)

    def of(self, part: tuple[slice, slice], *tensors: Tensor) -> list[Tensor]:
        """Return the part of each tensor (B, H, L, D), as (heads, L, D)."""
        cut = [x[part].flatten(0, 1) for x in tensors]
        return [x.contiguous() for x in cut] if self.contiguous else cut

    def softmax(self, q: Tensor, k: Tensor, scale: float) -> Iterator[_Step]:
        """Yield the weights of each group, the last first; each is overwritten by the next."""
        q, k = q.to(self.scores.dtype), k.to(self.scores.dtype)
        for start, end, group in self.groups:
            S = self.scores[: len(q) * (end - start) * end].view(len(q), end - start, end)
            S.baddbmm_(q[:, start:end], k[:, :end].mT, beta=0, alpha=scale)
            if len(group) > 1:
                S[:, :, start:].masked_fill_(~reference.mask(group), float("-inf"))
            yield start, end, torch.softmax(S, dim=-1, out=S)

    def cut(self, values: Tensor, heads: int) -> Iterator[_Step]:
        """Yield what `softmax` does, from kept weights."""
        for start, end, _ in self.groups:
            size = heads * (end - start) * end
            yield start, end, values[:size].view(heads, end - start, end)
            values = values[size:]
