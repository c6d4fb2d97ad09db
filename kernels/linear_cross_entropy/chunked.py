"""This implementation holds the logits of some rows at a time, on any device.

As in Wijmans et al. 2024 (arXiv:2411.09009, §3), rows go through the head in chunks; unlike there the gradient is made
right after the loss, while the chunk's probabilities are at hand, so that no product is computed twice. With W the
head's weight, c its bias, x a row and t its target: logits z = W x + c, loss log sum_j exp(z_j) - z_t, and the loss's
gradient with respect to z is softmax(z) - onehot(t).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mars.kernels import _backend

CHUNK = {"cpu": 1 << 22, "other": 1 << 25}  # logits at once: near the cache; on a GPU, enough to fill it


def rows_at_once(x: Tensor, codes: int) -> int:
    """Return for how many rows of x (N, W) the logits of `codes` codes are to exist at a time: 1 to N."""
    budget = CHUNK["cpu" if _backend.device_type(x) == "cpu" else "other"]
    return min(max(budget // codes, 1), len(x))


def mean(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mean cross-entropy, with the bits of `mean_and_gradients` but without the work for its gradients."""
    head = _Head(x, weight, bias, dtype)
    total = torch.zeros((), device=x.device, dtype=head.exact)
    for rows, targets in zip(x.split(head.rows), target.split(head.rows), strict=True):
        total += _softmax(head.logits(rows.to(dtype)), targets)[1].sum()
    return total / len(x)


def mean_and_gradients(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean cross-entropy, and the gradients of the *sum* over rows for x, weight and bias.

    Args:
        x, weight, bias, target: as for `op.linear_cross_entropy`.
        dtype: of the products.
    """
    head = _Head(x, weight, bias, dtype)
    total = torch.zeros((), device=x.device, dtype=head.exact)
    dx, dw, db = torch.empty_like(x), torch.empty_like(weight), torch.zeros_like(bias)
    chunks = zip(*(t.split(head.rows) for t in (x, target, dx)), strict=True)
    for i, (rows, targets, out) in enumerate(chunks):
        rows = rows.to(dtype)
        p, losses = _softmax(head.logits(rows), targets)
        total += losses.sum()
        p.scatter_add_(1, targets[:, None], p.new_full((len(targets), 1), -1.0))
        db += p.sum(0)
        p = head.lowered(p)
        if dtype == x.dtype:
            torch.mm(p, head.weight, out=out)
            dw.addmm_(p.T, rows, beta=min(i, 1))  # 0 overwrites
        else:
            out.copy_(p @ head.weight)
            dw.copy_(p.T @ rows) if i == 0 else dw.add_(p.T @ rows)
    return total / len(x), dx, dw, db


def scores(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return per row the loss (N,) and whether the target has the largest logit, bool (N,); see `op.token_scores`."""
    head, losses, right = _Head(x, weight, bias, dtype), [], []
    for rows, targets in zip(x.split(head.rows), target.split(head.rows), strict=True):
        logits = head.logits(rows.to(dtype))
        right.append(logits.argmax(1) == targets)
        losses.append(_softmax(logits, targets)[1])
    return torch.cat(losses), torch.cat(right)


class _Head:
    """This gives logits of some rows at a time, all in the same memory: float32, or float64 if its products are."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.bias = weight.to(dtype), bias.to(dtype)
        self.exact = torch.promote_types(dtype, torch.float32)
        self.rows = rows_at_once(x, len(weight))
        shape = self.rows, len(weight)
        self._logits = torch.empty(shape, device=x.device, dtype=self.exact)
        self._low = self._logits if dtype == self.exact else torch.empty(shape, device=x.device, dtype=dtype)

    def logits(self, rows: Tensor) -> Tensor:
        """Return the logits (n, V) of rows (n, W), which overwrite those returned before."""
        low = torch.addmm(self.bias, rows, self.weight.T, out=self._low[: len(rows)])
        return low if self._low is self._logits else self._logits[: len(rows)].copy_(low)

    def lowered(self, gradient: Tensor) -> Tensor:
        """Return the gradient (n, V) of the logits in the dtype of the products."""
        return gradient if self._low is self._logits else self._low[: len(gradient)].copy_(gradient)


def _softmax(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities, on a CPU in place of the logits, and the losses log sum exp(z) - z_t.

    The largest probability is exp(z_max) / sum exp(z), so that no second pass of exponentials is needed.
    """
    largest, aimed = logits.amax(1), logits.gather(1, target[:, None])[:, 0]
    p = torch.softmax(logits, 1, out=logits if _backend.device_type(logits) == "cpu" else None)
    return p, largest - p.amax(1).log() - aimed
