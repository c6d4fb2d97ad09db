"""Cross-entropy of a linear head without its logits: the float32 matrix rows x V never exists whole.

As in Wijmans et al. 2024 (arXiv:2411.09009, §3), rows go through the head in chunks; unlike there the gradient is made
right after the loss, while the chunk's probabilities are at hand, so that no product is computed twice. With W the
head's weight, c its bias, x a row and t its target: logits z = W x + c, loss log sum_j exp(z_j) - z_t, and the loss's
gradient with respect to z is softmax(z) - onehot(t).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = {"cpu": 1 << 22, "other": 1 << 25}  # logits at once: near the cache; on a GPU, enough to fill it


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """Mean of F.cross_entropy(F.linear(x, weight, bias).float(), target), in nats; differentiable once.

    Under autocast the products run in its dtype, as those of `F.linear`; the softmax is float32 always. Sums over rows
    are float32 too, so gradients are a little more exact than PyTorch's.

    Args:
        x: (N, W), N at least 1.
        weight, bias: (V, W), (V,).
        target: int64 (N,), in 0..V-1.
    """
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, target, _product_dtype(x)
    )
    return loss


@torch.no_grad()
def token_scores(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the cross-entropy, float32 (N,), and whether the target has the largest logit, bool (N,).

    Arguments and precision are those of `linear_cross_entropy`; among equal logits the first counts.
    """
    dtype = _product_dtype(x)
    losses, right = [], []
    for rows, aims in _chunks(x, weight, target):
        logits = _logits(rows.to(dtype), weight.to(dtype), bias.to(dtype))
        right.append(logits.argmax(1) == aims)
        losses.append(_softmax(logits, aims)[1])
    return torch.cat(losses), torch.cat(right)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            w, b = weight.to(dtype), bias.to(dtype)
            total = torch.zeros((), device=x.device)
            dx = torch.empty_like(x)
            dw, db = torch.zeros_like(weight), torch.zeros_like(bias)
            start = 0
            for rows, aims in _chunks(x, weight, target):
                rows = rows.to(dtype)
                logits = _logits(rows, w, b)
                p, losses = _softmax(logits, aims)
                del logits
                total += losses.sum()
                p.scatter_add_(1, aims[:, None], p.new_full((len(aims), 1), -1.0))
                db += p.sum(0)
                p = p.to(dtype)
                dx[start : start + len(rows)] = p @ w
                if dtype == dw.dtype:
                    dw.addmm_(p.T, rows)
                else:
                    dw += p.T @ rows
                start += len(rows)
        ctx.save_for_backward(dx, dw, db)
        return total / len(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db = ctx.saved_tensors
        gradient = gradient / len(dx)
        return dx * gradient, dw * gradient, db * gradient, None, None


def _product_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _chunks(x: Tensor, weight: Tensor, target: Tensor) -> zip[tuple[Tensor, Tensor]]:
    rows = max(CHUNK["cpu" if x.device.type == "cpu" else "other"] // len(weight), 1)
    return zip(x.split(rows), target.split(rows), strict=True)


def _logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x, weight.T).float()


def _softmax(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The probabilities, on a CPU in place of the logits, and the losses log sum exp(z) - z_t.

    The largest probability is exp(z_max) / sum exp(z), so that no second pass of exponentials is needed.
    """
    largest, aimed = logits.amax(1), logits.gather(1, target[:, None])[:, 0]
    p = torch.softmax(logits, 1, out=logits if logits.device.type == "cpu" else None)
    return p, largest - p.amax(1).log() - aimed
