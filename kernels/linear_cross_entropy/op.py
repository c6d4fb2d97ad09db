"""This is the contract of `linear_cross_entropy`, the loss of a linear head without its logits.

The matrix of logits, rows x codes in float32, never exists whole: for 16,384 codes it would be the largest tensor of a
training step. MARS_KERNELS=reference takes all logits at once; every other choice goes through them in chunks of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mars.kernels import _backend, _native
from mars.kernels.linear_cross_entropy import chunked, reference


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """Compute F.cross_entropy(F.linear(x, weight, bias).float(), target), the mean in nats; differentiable once.

    Under autocast the products run in its dtype, as those of `F.linear`; the softmax is float32 always, or float64 for
    such inputs. Sums over rows are of that dtype too, so gradients are a little more exact than PyTorch's. The gradient
    is computed together with the loss, or not at all where none is recorded (`torch.no_grad`).

    Args:
        x: (N, W) of a float dtype, N at least 1.
        weight, bias: (V, W), (V,), of the dtype of x.
        target: int64 (N,), in 0..V-1. The range is checked on a CPU only: elsewhere that would make the host wait.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a target is out of range.
    """
    run = _backend.select("linear_cross_entropy", _LOSSES, _backend.choice())
    return run(x, weight, bias, target, _product_dtype(x))


@torch.no_grad()
def token_scores(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return per row the cross-entropy, float32 (N,), and whether the target has the largest logit, bool (N,).

    Arguments, precision and errors are those of `linear_cross_entropy`; among equal logits the first counts.
    """
    dtype = _product_dtype(x)
    _check("token_scores", x, weight, bias, target, dtype)
    _check_values("token_scores", x, weight, bias, target)
    run = _backend.select("token_scores", _SCORES, _backend.choice())
    with torch.autocast(x.device.type, enabled=False):
        return run(x, weight, bias, target, dtype)


def _by_definition(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the reference, whose gradients are PyTorch's own."""
    _check("linear_cross_entropy", x, weight, bias, target, dtype)
    _check_values("linear_cross_entropy", x, weight, bias, target)
    with torch.autocast(x.device.type, enabled=False):
        return reference.linear_cross_entropy(x, weight, bias, target, dtype)


def _in_chunks(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _linear_cross_entropy(x, weight, bias, target, dtype)[0]
    _check("linear_cross_entropy", x, weight, bias, target, dtype)
    _check_values("linear_cross_entropy", x, weight, bias, target)
    with torch.autocast(x.device.type, enabled=False):
        return chunked.mean(x, weight, bias, target, dtype)


# By what MARS_KERNELS asks for: the chunks are plain PyTorch and run wherever it does.
_LOSSES: dict[str, Callable[..., Tensor]] = {
    "reference": _by_definition,
    **dict.fromkeys(("auto", "native", "triton"), _in_chunks),
}
_SCORES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": reference.token_scores,
    **dict.fromkeys(("auto", "native", "triton"), chunked.scores),
}


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, dtype: torch.dtype) -> None:
    if x.ndim != 2 or weight.ndim != 2 or 0 in (len(x), len(weight)) or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: want x (N, W) and weight (V, W), N and V at least 1; got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    if bias.shape != weight.shape[:1] or target.shape != x.shape[:1]:
        raise ValueError(
            f"{op}: want bias ({len(weight)},) and target ({len(x)},); got {tuple(bias.shape)}, {tuple(target.shape)}"
        )
    if not x.is_floating_point() or not x.dtype == weight.dtype == bias.dtype or target.dtype != torch.int64:
        raise ValueError(
            f"{op}: want x, weight and bias of one float dtype and target int64; "
            f"got {x.dtype}, {weight.dtype}, {bias.dtype}, {target.dtype}"
        )
    if any(t.device != x.device for t in (weight, bias, target)):
        raise ValueError(f"{op}: want all tensors on x's device, {x.device}")
    if not dtype.is_floating_point:
        raise ValueError(f"{op}: want products of a float dtype, got {dtype}")


def _check_values(op: str, x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> None:
    """Raise ValueError where a tensor lacks its memory or, on a CPU, where a target is out of range."""
    if torch.compiler.is_compiling() or isinstance(target, FakeTensor):
        return
    _native.check_memory(op, x, weight, bias, target)
    if target.device.type == "cpu" and ((target < 0) | (target >= len(weight))).any():
        raise ValueError(f"{op}: want targets in 0..{len(weight) - 1}, got {int(target.min())} to {int(target.max())}")


def _product_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    lowered = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if lowered else x.dtype


@torch.library.custom_op("mars::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, and the gradients of the sum over rows, which the backward scales."""
    _check("linear_cross_entropy", x, weight, bias, target, dtype)
    _check_values("linear_cross_entropy", x, weight, bias, target)
    with torch.autocast(x.device.type, enabled=False):
        return chunked.mean_and_gradients(x, weight, bias, target, dtype)


@_linear_cross_entropy.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check("linear_cross_entropy", x, weight, bias, target, dtype)
    exact = torch.promote_types(dtype, torch.float32)
    return x.new_empty((), dtype=exact), torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


class _Once(torch.autograd.Function):
    """This passes gradients on as they are and makes it an error to differentiate them, which would give 0."""

    @staticmethod
    def forward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *unused: Tensor) -> NoReturn:
        raise RuntimeError("linear_cross_entropy: it is differentiable once; MARS_KERNELS=reference is so twice")


def _backward(ctx: Any, gradient: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 5
    gradients: tuple[Tensor, ...] = ctx.saved_tensors
    gradient = gradient / len(gradients[0])
    if torch.is_grad_enabled():  # create_graph=True
        gradients = _Once.apply(*gradients)  # type: ignore[no-untyped-call]
    return *(g * gradient for g in gradients), None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_save)
