"""This is the definition, in plain PyTorch: the linear head and the cross-entropy of all its logits at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the logits (N, V) of rows x (N, W): products in `dtype`, the result in float32, or in float64 for that."""
    z = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    return z if dtype == torch.float64 else z.float()


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """See `op.linear_cross_entropy`; dtype is that of the product."""
    return F.cross_entropy(logits(x, weight, bias, dtype), target)


def token_scores(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `op.token_scores`; dtype is that of the product."""
    z = logits(x, weight, bias, dtype)
    return F.cross_entropy(z, target, reduction="none"), z.argmax(1) == target
