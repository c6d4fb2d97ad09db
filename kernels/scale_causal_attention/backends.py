"""These are scale-causal attentions by PyTorch's own functions and by packages that may be installed.

Each takes q, k, v (B, H, L, D), normalised already where that is wanted, the lengths of the scales and the factor on
the scores, and returns (B, H, L, D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mars.kernels.scale_causal_attention import reference

Group = tuple[int, int, tuple[int, ...]]  # first token, end, and the lengths of its scales
Attend = Callable[[Tensor, Tensor, Tensor, Sequence[int], float], Tensor]

GROUP = 160  # tokens: scales are joined up to here, since many small calls cost more than a mask


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Call `scaled_dot_product_attention` once, with a mask where there is more than one scale."""
    mask = reference.mask(lengths, q.device) if len(lengths) > 1 else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def per_scale(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Call `scaled_dot_product_attention` for each scale, on the keys up to its end: no mask, which NaN could pass."""
    parts = (F.scaled_dot_product_attention(*part, scale=scale) for part in _scales(q, k, v, lengths, dim=2))
    return torch.cat(list(parts), dim=2)


def grouped(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Call `scaled_dot_product_attention` for each group of scales, with a mask inside the group."""
    return _by_group(q, k, v, lengths, scale, F.scaled_dot_product_attention)


def flash(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Call the flash-attn package for each large scale, and PyTorch for each group of small ones."""
    from flash_attn import flash_attn_func

    def unmasked(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale).transpose(1, 2)

    return _by_group(q, k, v, lengths, scale, unmasked)


def xformers(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Call the xformers package for each large scale, and PyTorch for each group of small ones."""
    from xformers.ops import memory_efficient_attention

    def unmasked(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)

    return _by_group(q, k, v, lengths, scale, unmasked)


def _by_group(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, unmasked: Callable[..., Tensor]
) -> Tensor:
    """Let each group attend to the keys up to its end: with a mask by PyTorch, and a single scale without one."""
    parts = []
    for start, end, group in groups(lengths):
        rows = q[:, :, start:end], k[:, :, :end], v[:, :, :end]
        if len(group) > 1:
            own = reference.mask(group, q.device)
            mask = torch.cat((own.new_ones(end - start, start), own), dim=1)
            parts.append(F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale))
        else:
            parts.append(unmasked(*rows, scale=scale))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def flex(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Call FlexAttention (Dong et al. 2024, arXiv:2412.05496), compiled."""
    attend, block_mask = _compiled_flex(), _block_mask(tuple(lengths), q.device)
    out: Tensor = attend(q, k, v, block_mask=block_mask, scale=scale)
    return out


def groups(lengths: Sequence[int], least: int | None = None) -> list[Group]:
    """Join scales to groups of `least` tokens (`GROUP`) or more: (start, end, lengths of its scales) of each.

    The last may be smaller. With 1 each scale is a group of its own.
    """
    least = GROUP if least is None else least
    result: list[tuple[int, ...]] = [()]
    for n in lengths:
        if sum(result[-1]) >= least:
            result.append(())
        result[-1] += (n,)
    ends = (0, *accumulate(map(sum, result)))
    return [(start, end, group) for (start, end), group in zip(pairwise(ends), result, strict=True)]


def finite(*tensors: Tensor) -> bool:
    """Return whether the sums of the tensors are finite. On a GPU the answer would make the host wait."""
    return all(isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).item()) for x in tensors)


def hiding(lengths: Sequence[int], least: int | None = None) -> int:
    """Return how many rows, from the first on, have keys in their group that a mask hides; 0 where there is no mask.

    A weight of 0 hides what is finite only: 0 times NaN is NaN, and so is NaN less infinity, PyTorch's own masking.
    """
    return _hiding(tuple(lengths), GROUP if least is None else least)


@lru_cache(maxsize=64)
def _hiding(lengths: tuple[int, ...], least: int) -> int:
    return max((end - group[-1] for _, end, group in groups(lengths, least) if len(group) > 1), default=0)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(maxsize=64)
def _block_mask(lengths: tuple[int, ...], device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    ends, L = reference.kv_end(lengths, device), sum(lengths)
    return create_block_mask(lambda b, h, i, j: j < ends[i], None, None, L, L, device=device.type)


def _scales(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], dim: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the queries of each scale and the keys and values up to its end; `dim` is that of the tokens."""
    for n, end in zip(lengths, accumulate(lengths), strict=True):
        yield q.narrow(dim, end - n, n), k.narrow(dim, 0, end), v.narrow(dim, 0, end)
