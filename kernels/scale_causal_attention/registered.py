"""The implementations of our own as PyTorch ops: schema, shapes without data, gradients.

`mars::scale_causal_attention` is the Triton kernels', with the l2-normalisation; it also returns what its backward
needs, which has no gradient. `mars::hybrid_attention` is the CPU's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mars.kernels.scale_causal_attention import hybrid


def empty_like_heads(x: Tensor) -> Tensor:
    """Uninitialised (B, H, L, D) laid out as (B, L, H, D), so that merging the heads again copies nothing."""
    B, H, L, D = x.shape
    return x.new_empty(B, L, H, D).transpose(1, 2)


@torch.library.custom_op("mars::scale_causal_attention", mutates_args=())
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention, log-sum-exp of the scores over log 2, and, with head_scale, 1 / |q| and 1 / |k| (else empty)."""
    from mars.kernels.scale_causal_attention import triton

    return triton.forward(q, k, v, head_scale, lengths, scale)


@torch.library.custom_op("mars::scale_causal_attention_backward", mutates_args=())
def fused_attention_backward(
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
    """Gradients of q, k, v and, with head_scale, of that (else empty)."""
    from mars.kernels.scale_causal_attention import triton

    return triton.backward(do, q, k, v, head_scale, out, lse, q_inverse, k_inverse, lengths, scale)


@fused_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    dq, dk, dv, dgain = fused_attention_backward(do, *ctx.saved_tensors, ctx.lengths, ctx.scale)
    return dq, dk, dv, dgain if ctx.needs_input_grad[3] else None, None, None


fused_attention.register_autograd(_fused_gradients, setup_context=_save_fused)


@torch.library.custom_op("mars::hybrid_attention", mutates_args=())
def hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """Attention and, with keep and while they are small, its weights (else empty)."""
    return hybrid.forward(q, k, v, head_scale, lengths, scale, keep)


@torch.library.custom_op("mars::hybrid_attention_backward", mutates_args=())
def hybrid_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_scale: Tensor | None,
    weights: Tensor,
    lengths: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, with head_scale, of that (else empty)."""
    return hybrid.backward(do, q, k, v, head_scale, weights, lengths, scale)


@hybrid_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float, keep: bool
) -> tuple[Tensor, Tensor]:
    return empty_like_heads(q), q.new_empty(hybrid.kept(q, lengths) if keep else 0)


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
    dq, dk, dv, dgain = hybrid_attention_backward(do, *ctx.saved_tensors, ctx.lengths, ctx.scale)
    return dq, dk, dv, dgain if ctx.needs_input_grad[3] else None, None, None, None


hybrid_attention.register_autograd(_hybrid_gradients, setup_context=_save_hybrid)
