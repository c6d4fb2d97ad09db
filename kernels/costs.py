"""This module says what the operations cost beyond what their schemas show, to plan a step on fake tensors.

Importing this registers formulas with `torch.utils.flop_counter`, in PyTorch's convention: a multiply-add is two FLOPs,
only products count, and a backward of attention computes the scores again.

Letters: B batch, H heads, L tokens, D values, V codes, N rows or scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop, sdpa_flop

from mars.kernels import _backend
from mars.kernels.linear_cross_entropy import chunked
from mars.kernels.nearest_code.reference import SCORES
from mars.kernels.scale_causal_attention import backends, hybrid

_mars, _aten = torch.ops.mars, torch.ops.aten
_SEARCH = 4 * SCORES  # bytes of scores that plain PyTorch's search holds at a time
Shape = Sequence[int]


def visible(lengths: Sequence[int]) -> int:
    """Count the pairs of a query and a key that it sees: the sum over scales of n_k (n_1 + ... + n_k)."""
    return sum(n * end for n, end in zip(lengths, accumulate(lengths), strict=True))


@register_flop_formula(_mars.nearest_code)
def _search(x: Shape, codebook: Shape, metric: str, **_: Any) -> int:
    return 2 * x[0] * codebook[0] * codebook[1]


@register_flop_formula(_mars.multiscale_quantize)
def _quantize(
    f: Shape,
    codebook: Shape,
    weight: Shape,
    bias: Shape,
    phi_index: Sequence[int],
    scales: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """Count the search of every token and a 3 x 3 convolution per scale, without the up- and down-sampling."""
    batch, dim, height, width = f
    tokens = sum(h * w for h, w in zip(scales[::2], scales[1::2], strict=True))
    return 2 * batch * (tokens * codebook[0] * dim + len(phi_index) * 9 * dim * dim * height * width)


@register_flop_formula([_mars.scale_causal_attention, _mars.hybrid_attention])
def _attention(
    q: Shape, k: Shape, v: Shape, head_scale: Shape | None, lengths: Sequence[int], *_: Any, **__: Any
) -> int:
    """Count two products of what is visible, on whatever implementation."""
    return 2 * 2 * q[0] * q[1] * q[3] * visible(lengths)


@register_flop_formula([_mars.scale_causal_attention_backward, _mars.hybrid_attention_backward])
def _attention_backward(do: Shape, q: Shape, k: Shape, v: Shape, *rest: Any, **_: Any) -> int:
    """Count five products of what is visible."""
    return 5 * 2 * q[0] * q[1] * q[3] * visible(rest[-2])


@register_flop_formula(_mars.linear_cross_entropy)
def _cross_entropy(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Count the logits and the gradients of x and of the weight, which come with them."""
    return 3 * 2 * x[0] * x[1] * weight[0]


# PyTorch counts the fused attention of GPUs alone.
for _formula, _op in (
    (sdpa_flop, _aten._scaled_dot_product_flash_attention_for_cpu),
    (sdpa_backward_flop, _aten._scaled_dot_product_flash_attention_for_cpu_backward),
):
    if _op not in flop_registry:
        register_flop_formula(_op, get_raw=True)(_formula)


def workspace(op: Any, arguments: Sequence[Any]) -> int:
    """Return the bytes that a `torch._ops.OpOverload` holds while it runs, besides its arguments and results."""
    formula = _WORKSPACES.get(op.overloadpacket)
    return formula(*arguments) if formula is not None else 0


def _search_workspace(x: Tensor, codebook: Tensor, *_: Any) -> int:
    """Count the codebook as the kernel reads it, twice, and per row what is kept of each part of the codebook."""
    (rows, dim), size = x.shape, len(codebook)
    if _backend.backend(_backend.device_type(x)) == "reference":
        return 2 * min(_SEARCH, 4 * rows * size) + 8 * size * dim
    return 8 * size * dim + 4 * rows * dim + 80 * rows


def _quantize_workspace(f: Tensor, codebook: Tensor, *_: Any) -> int:
    """Count the residual, its rows, and the search of the finest scale."""
    return 4 * f.numel() + _search_workspace(f.permute(0, 2, 3, 1).reshape(-1, f.shape[1]), codebook)


def _fused_backward_workspace(do: Tensor, q: Tensor, *_: Any) -> int:
    """Count two float32 per query: the row sums of the softmax's gradient, and those of the head's scale."""
    return 8 * q.numel() // q.shape[3]


def _hybrid_workspace(
    q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float, keep: bool
) -> int:
    if keep and hybrid.saved_numel(q, lengths):
        return _slabs(q, lengths)
    parts = 2 * q.nbytes if len(backends.groups(lengths)) > 1 else q.nbytes
    return parts if head_scale is None else max(parts, 8 * q.numel()) + 2 * q.nbytes


def _hybrid_backward_workspace(do: Tensor, q: Tensor, *rest: Any) -> int:
    if hybrid.widened(q):  # do, q, k and v in float32, and the gradients in both
        return _slabs(q.new_empty(q.shape, dtype=torch.float32, device="meta"), rest[-2]) + 7 * 4 * q.numel()
    return _slabs(q, rest[-2])


def _slabs(q: Tensor, lengths: Sequence[int]) -> int:
    """Count the scores in float32 and in the dtype of q, and the normalised rows of their heads."""
    slabs = hybrid.Slabs(q, backends.groups(lengths))
    rows = min(slabs.samples, len(q)) * slabs.heads * q.shape[2]
    return slabs.size * (4 + q.element_size()) + 24 * rows * q.shape[3]


def _cross_entropy_workspace(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, dtype: torch.dtype, *_: Any
) -> int:
    """Count the logits of a chunk and their softmax, and copies in the dtype of the products where that is lower."""
    rows, (codes, width) = chunked.rows_at_once(x, len(weight)), weight.shape
    exact = torch.promote_types(dtype, torch.float32)
    held = rows * codes * exact.itemsize * (1 if _backend.device_type(x) == "cpu" else 2)
    if dtype == x.dtype:
        return held
    return held + (rows * codes + 2 * codes * width + 2 * rows * width) * dtype.itemsize


def _flash_backward_workspace(do: Tensor, q: Tensor, *_: Any) -> int:
    """Count the gradient of q in float32, in which a GPU adds it up."""
    return 4 * q.numel() if _backend.device_type(q) == "cuda" else 0


_WORKSPACES: dict[Any, Callable[..., int]] = {
    _mars.nearest_code: _search_workspace,
    _mars.multiscale_quantize: _quantize_workspace,
    _mars.linear_cross_entropy: _cross_entropy_workspace,
    _mars.scale_causal_attention_backward: _fused_backward_workspace,
    _mars.hybrid_attention: _hybrid_workspace,
    _mars.hybrid_attention_backward: _hybrid_backward_workspace,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward_workspace,
}
