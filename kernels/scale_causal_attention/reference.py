"""The definition, in plain PyTorch: a dense additive mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mask(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """bool (L, L): True where query i may see key j, that is scale(i) >= scale(j)."""
    scale = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    return scale[:, None] >= scale[None, :]


def scale_causal_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """See `op.scale_causal_attention`."""
    scores = (q @ k.transpose(-2, -1)) * scale
    scores = scores.masked_fill(~mask(lengths, q.device), float("-inf"))
    return scores.softmax(dim=-1) @ v
