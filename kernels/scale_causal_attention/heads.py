"""This module says which heads the Triton kernels take, and how results lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

TRITON_SIZES = (16, 32, 64, 128)  # values of a head
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def empty_like_heads(x: Tensor) -> Tensor:
    """Return new memory (B, H, L, D) laid out as (B, L, H, D), so that merging the heads again copies nothing."""
    B, H, L, D = x.shape
    return x.new_empty(B, L, H, D).transpose(1, 2)
