"""Contract of `scale_causal_attention`: VAR's block-causal training mask (Tian et al. 2024, §3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mars.kernels.scale_causal_attention import reference

_GROUP = 96  # tokens: up to here the scales share one masked call, since many small calls cost more than the mask


def scale_causal_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float = 1.0) -> Tensor:
    """Each token attends to all tokens of its own and of coarser scales.

    Exact without a mask for the long scales: one unmasked call each, on the keys up to its own end.

    Args:
        q, k, v: (B, H, L, d).
        lengths: tokens of each scale, coarse to fine; they add up to L.
        scale: factor on the scores before the softmax.

    Returns:
        (B, H, L, d).

    Raises:
        ValueError: the shapes differ or do not add up.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape or q.shape[2] != sum(lengths):
        raise ValueError(
            f"scale_causal_attention: want q, k, v (B, H, {sum(lengths)}, d) for scales of {list(lengths)} tokens; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    outputs, start = [], 0
    for group in _groups(tuple(lengths)):
        end = start + sum(group)
        mask = reference.mask(group, q.device) if len(group) > 1 else None  # of the first group only, so n x n
        outputs.append(attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask, scale))
        start = end
    return torch.cat(outputs, dim=2) if len(outputs) != 1 else outputs[0]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Softmax attention of q (B, H, n, d) over k, v (B, H, m, d); mask: bool (n, m), True where allowed."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # PyTorch's fused CPU kernel does not reach the matrix units in bfloat16; plain matrix products do.
        scores = torch.matmul(q * scale, k.transpose(-2, -1))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return torch.matmul(scores.softmax(dim=-1), v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _groups(lengths: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The coarse scales of together at most `_GROUP` tokens as one group, then each scale alone."""
    first = 0
    while first < len(lengths) and sum(lengths[: first + 1]) <= _GROUP:
        first += 1
    return ([lengths[:first]] if first else []) + [(n,) for n in lengths[first:]]
