"""This module registers our own implementations as PyTorch ops: schema, shapes without data, gradients.

`mars::scale_causal_attention` is the Triton kernels', with the l2-normalisation; it also returns what its backward
needs, which has no gradient. `mars::hybrid_attention` is the CPU's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mars.kernels import _native
from mars.kernels._direct import differentiated, direct, unobserved
from mars.kernels.scale_causal_attention import hybrid
from mars.kernels.scale_causal_attention.heads import TRITON_DTYPES, TRITON_SIZES, empty_like_heads


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float
) -> None:
    if (
        q.ndim != 4
        or not q.shape == k.shape == v.shape
        or not lengths
        or min(lengths) < 1
        or sum(lengths) != q.shape[2]
    ):
        raise ValueError(
            f"{op}: want q, k, v (B, H, {sum(lengths)}, D) for scales of {list(lengths)} tokens, each 1 or more; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"{op}: want q, k, v of one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device == (q if head_scale is None else head_scale).device:
        raise ValueError(f"{op}: want all tensors on q's device, {q.device}")
    if head_scale is not None and (head_scale.shape != q.shape[1:2] or not head_scale.is_floating_point()):
        raise ValueError(
            f"{op}: want head_scale ({q.shape[1]},) of a float dtype, got {tuple(head_scale.shape)} {head_scale.dtype}"
        )
    if not 0 <= scale < float("inf"):
        raise ValueError(f"{op}: want a finite scale of 0 or more, got {scale}")


def _check_fused(
    op: str, q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float
) -> None:
    _check(op, q, k, v, head_scale, lengths, scale)
    if q.shape[3] not in TRITON_SIZES or q.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"{op}: the Triton kernels want heads of {', '.join(map(str, TRITON_SIZES))} values in float32, float16 or "
            f"bfloat16; got {q.shape[3]} in {q.dtype}"
        )


def _check_saved(op: str, q: Tensor, dtype: torch.dtype, saved: Sequence[Tensor], shape: Sequence[int]) -> None:
    """Raise ValueError where what a backward is given beside the inputs of its forward does not fit."""
    for x in saved:
        if x.shape != tuple(shape) or x.dtype != dtype or x.device != q.device:
            raise ValueError(
                f"{op}: want {tuple(shape)} of {dtype} on {q.device}, got {tuple(x.shape)} of {x.dtype} on {x.device}"
            )


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return attention, log-sum-exp of the scores over log 2, and, with head_scale, 1 / |q|, 1 / |k| (else empty)."""
    _check_fused("scale_causal_attention", q, k, v, head_scale, lengths, scale)
    _native.check_memory("scale_causal_attention", q, k, v, head_scale)
    from mars.kernels.scale_causal_attention import triton

    return triton.forward(q, k, v, head_scale, lengths, scale)


fused_attention = torch.library.custom_op("mars::scale_causal_attention", _fused_attention, mutates_args=())


def _fused_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_scale: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q_inverse: Tensor,
    k_inverse: Tensor,
    lengths: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and, with head_scale, of that (else empty)."""
    name, rows = "scale_causal_attention_backward", q.shape[:3]
    _check_fused(name, q, k, v, head_scale, lengths, scale)
    _check_saved(name, q, q.dtype, (do, out), q.shape)
    _check_saved(name, q, torch.float32, (lse,), rows)
    _check_saved(name, q, torch.float32, (q_inverse, k_inverse), (0,) if head_scale is None else rows)
    _native.check_memory(name, do, q, k, v, head_scale, out, lse, q_inverse, k_inverse)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # as `triton.forward` lays them out
    lse, q_inverse, k_inverse = lse.contiguous(), q_inverse.contiguous(), k_inverse.contiguous()

    from mars.kernels.scale_causal_attention import triton

    return triton.backward(do, q, k, v, head_scale, out, lse, q_inverse, k_inverse, lengths, scale)


fused_attention_backward = torch.library.custom_op(
    "mars::scale_causal_attention_backward", _fused_attention_backward, mutates_args=()
)


@fused_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_fused("scale_causal_attention", q, k, v, head_scale, lengths, scale)
    rows = q.shape[:3]
    lse, *inverses = (q.new_empty(n, dtype=torch.float32) for n in (rows, *[0 if head_scale is None else rows] * 2))
    return empty_like_heads(q), lse, inverses[0], inverses[1]


@fused_attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, *saved: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgain = q.new_empty(0, dtype=torch.float32) if head_scale is None else head_scale.new_empty(head_scale.shape)
    return empty_like_heads(q), empty_like_heads(q), empty_like_heads(q), dgain


def _save_fused(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.lengths, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _fused_gradients(ctx: Any, do: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 6
    arguments = do, *ctx.saved_tensors, ctx.lengths, ctx.scale
    if direct(do):  # saved by our own forward, so that no more than this is left to check
        _native.check_memory("scale_causal_attention_backward", *arguments[:4])
        from mars.kernels.scale_causal_attention import triton

        dq, dk, dv, dgain = triton.backward(*arguments)
    else:
        dq, dk, dv, dgain = fused_attention_backward(*arguments)
    return dq, dk, dv, dgain if ctx.needs_input_grad[3] else None, None, None


fused_attention.register_autograd(_fused_gradients, setup_context=_save_fused)


def _hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """Return attention and, with keep and while they are small, its weights (else empty)."""
    _check("hybrid_attention", q, k, v, head_scale, lengths, scale)
    _native.check_memory("hybrid_attention", q, k, v, head_scale)
    return hybrid.forward(q, k, v, head_scale, lengths, scale, keep)


hybrid_attention = torch.library.custom_op("mars::hybrid_attention", _hybrid_attention, mutates_args=())


def _hybrid_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_scale: Tensor | None,
    weights: Tensor,
    lengths: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and, with head_scale, of that (else empty)."""
    name = "hybrid_attention_backward"
    _check(name, q, k, v, head_scale, lengths, scale)
    _check_saved(name, q, q.dtype, (do,), q.shape)
    _check_saved(name, q, q.dtype, (weights,), (hybrid.saved_numel(q, lengths) if weights.numel() else 0,))
    _native.check_memory(name, do, q, k, v, head_scale, weights)
    return hybrid.backward(do, q, k, v, head_scale, weights, lengths, scale)


hybrid_attention_backward = torch.library.custom_op(
    "mars::hybrid_attention_backward", _hybrid_attention_backward, mutates_args=()
)


@hybrid_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float, keep: bool
) -> tuple[Tensor, Tensor]:
    _check("hybrid_attention", q, k, v, head_scale, lengths, scale)
    return empty_like_heads(q), q.new_empty(hybrid.saved_numel(q, lengths) if keep else 0)


@hybrid_attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact = torch.promote_types(q.dtype, torch.float32)
    dgain = q.new_empty(0, dtype=exact) if head_scale is None else head_scale.new_empty(head_scale.shape)
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), dgain


def _save_hybrid(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.lengths, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _hybrid_gradients(ctx: Any, do: Tensor | None, unused: None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 7
    run = _hybrid_attention_backward if direct(do) else hybrid_attention_backward
    dq, dk, dv, dgain = run(do, *ctx.saved_tensors, ctx.lengths, ctx.scale)
    return dq, dk, dv, dgain if ctx.needs_input_grad[3] else None, None, None, None


hybrid_attention.register_autograd(_hybrid_gradients, setup_context=_save_hybrid)


class _Fused(torch.autograd.Function):
    """This is `fused_attention` with its gradients, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _fused_attention(*inputs)
        _save_fused(ctx, inputs, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None) -> tuple[Tensor | None, ...]:
        return _fused_gradients(ctx, do)


class _Hybrid(torch.autograd.Function):
    """This is `hybrid_attention` with its gradients, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _hybrid_attention(*inputs)
        _save_hybrid(ctx, inputs, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None) -> tuple[Tensor | None, ...]:
        return _hybrid_gradients(ctx, do, None)


def fused(q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float) -> Tensor:
    """Return the attention of the Triton kernels, by the shortest way to them."""
    tensors = q, k, v, head_scale
    if not unobserved(*tensors):
        return fused_attention(*tensors, lengths, scale)[0]
    if differentiated(*tensors):
        return _Fused.apply(*tensors, lengths, scale)
    return _fused_attention(*tensors, lengths, scale)[0]


def hybrid_of(
    q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float
) -> Tensor:
    """Return the attention of a CPU, by the shortest way to it."""
    tensors = q, k, v, head_scale
    keep = differentiated(q, k, v)
    if not unobserved(*tensors):
        return hybrid_attention(*tensors, lengths, scale, keep)[0]
    if differentiated(*tensors):
        return _Hybrid.apply(*tensors, lengths, scale, keep)
    return _hybrid_attention(*tensors, lengths, scale, keep)[0]
