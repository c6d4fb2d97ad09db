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
    head, losses, right = _Head(x, weight, bias, _product_dtype(x)), [], []
    for rows, aims in zip(x.split(head.rows), target.split(head.rows), strict=True):
        logits = head.logits(rows.to(head.dtype))
        right.append(logits.argmax(1) == aims)
        losses.append(_softmax(logits, aims)[1])
    return torch.cat(losses), torch.cat(right)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            head = _Head(x, weight, bias, dtype)
            total = torch.zeros((), device=x.device)
            dx, dw, db = torch.empty_like(x), torch.empty_like(weight), torch.zeros_like(bias)
            chunks = zip(*(t.split(head.rows) for t in (x, target, dx)), strict=True)
            for i, (rows, aims, out) in enumerate(chunks):
                rows = rows.to(dtype)
                p, losses = _softmax(head.logits(rows), aims)
                total += losses.sum()
                p.scatter_add_(1, aims[:, None], p.new_full((len(aims), 1), -1.0))
                db += p.sum(0)
                p = head.lowered(p)
                if dtype == x.dtype:
                    torch.mm(p, head.weight, out=out)
                    dw.addmm_(p.T, rows, beta=min(i, 1))  # 0 overwrites
                else:
                    out.copy_(p @ head.weight)
                    dw.copy_(p.T @ rows) if i == 0 else dw.add_(p.T @ rows)
        ctx.save_for_backward(dx, dw, db)
        return total / len(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient / len(ctx.saved_tensors[0])
        return *(saved.mul_(gradient) for saved in ctx.saved_tensors), None, None  # in place: a second time would raise


class _Head:
    """Logits of some rows at a time, float32, in memory that serves all of them."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.dtype = weight.to(dtype), bias.to(dtype), dtype
        self.rows = min(max(CHUNK["cpu" if x.device.type == "cpu" else "other"] // len(weight), 1), len(x))
        shape = self.rows, len(weight)
        self._logits = torch.empty(shape, device=x.device)
        self._low = self._logits if dtype == torch.float32 else torch.empty(shape, device=x.device, dtype=dtype)

    def logits(self, rows: Tensor) -> Tensor:
        """float32 (n, V) of rows (n, W); overwrites those given before."""
        low = torch.addmm(self.bias, rows, self.weight.T, out=self._low[: len(rows)])
        return low if self._low is self._logits else self._logits[: len(rows)].copy_(low)

    def lowered(self, gradient: Tensor) -> Tensor:
        """The gradient (n, V) of the logits in the dtype of the products."""
        return gradient if self._low is self._logits else self._low[: len(gradient)].copy_(gradient)


def _product_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _softmax(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The probabilities, on a CPU in place of the logits, and the losses log sum exp(z) - z_t.

    The largest probability is exp(z_max) / sum exp(z), so that no second pass of exponentials is needed.
    """
    largest, aimed = logits.amax(1), logits.gather(1, target[:, None])[:, 0]
    p = torch.softmax(logits, 1, out=logits if logits.device.type == "cpu" else None)
    return p, largest - p.amax(1).log() - aimed
