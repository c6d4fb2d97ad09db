"""This is the definition, in plain PyTorch, with a dense mask."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


def kv_end(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return the end of each token's own scale, int32 (L,): token i sees the keys before kv_end[i]."""
    ends = [end for n, end in zip(lengths, accumulate(lengths), strict=True) for _ in range(n)]
    return torch.tensor(ends, dtype=torch.int32).to(device)


def mask(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return bool (L, L), True where query i may see key j, that is scale(i) >= scale(j)."""
    return torch.arange(sum(lengths), device=device) < kv_end(lengths, device)[:, None]


def normalize(q: Tensor, k: Tensor, head_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return q / |q| times its head's scale and k / |k|, computed in float32 or better, in their own dtype."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_hat = F.normalize(q.to(dtype), dim=-1) * head_scale.to(dtype)[:, None, None]
    return q_hat.to(q.dtype), F.normalize(k.to(dtype), dim=-1).to(k.dtype)


def scale_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, *, head_scale: Tensor | None = None
) -> Tensor:
    """See `op.scale_causal_attention`."""
    if head_scale is not None:
        q, k = normalize(q, k, head_scale)
    scores = (q @ k.transpose(-2, -1)) * scale
    scores = scores.masked_fill(~mask(lengths, q.device), float("-inf"))
    return scores.softmax(dim=-1) @ v
