"""Scale-causal attention on a CPU: PyTorch's fused forward, and a backward of plain matrix products.

The fused forward reads q, k and v once and keeps its scores in float32, in bfloat16 too. Its backward is the slow half,
in bfloat16 above all, where it does not reach the matrix units. Here the weights are computed again from the scores and
the log-sum-exp that the forward kept, P = exp(S - lse), and the rest is the softmax's gradient (Dao et al. 2022,
arXiv:2205.14135, appendix B.2): dV = P' dO, dS = P (dP - sum P dP), dQ = dS K, dK = dS' Q.

Letters: B batch, H heads, L tokens, D values per head; a group is a few scales in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mars.kernels.scale_causal_attention import reference

GROUP = 160  # tokens: scales are joined up to here, since many small calls cost more than a mask
_SCORES = {4: 1 << 20, 2: 1 << 22}  # scores held at a time, by bytes of a value: bfloat16 products cost more to start


def groups(lengths: Sequence[int]) -> list[tuple[int, int, tuple[int, ...]]]:
    """(start, end, lengths of its scales) of consecutive groups of at least `GROUP` tokens, but for the last."""
    found: list[tuple[int, ...]] = [()]
    for n in lengths:
        if sum(found[-1]) >= GROUP:
            found.append(())
        found[-1] += (n,)
    ends = [sum(lengths[: sum(map(len, found[:i]))]) for i in range(len(found) + 1)]
    return [(start, end, group) for (start, end), group in zip(pairwise(ends), found, strict=True)]


def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """The attention (B, H, L, D), laid out as (B, L, H, D), and the log-sum-exp of its scores (B, H, L)."""
    B, H, L, D = q.shape
    out = q.new_empty(B, L, H, D).transpose(1, 2)
    lse = q.new_empty(B, H, L, dtype=torch.promote_types(q.dtype, torch.float32))
    if q.numel() == 0:
        return out, lse
    for start, end, group in groups(lengths):
        mask = None
        if len(group) > 1:
            own = torch.zeros(end - start, end - start, dtype=q.dtype)
            own.masked_fill_(~reference.mask(group), float("-inf"))
            mask = torch.cat((own.new_zeros(end - start, start), own), dim=1)
        out[:, :, start:end], lse[:, :, start:end] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, start:end], k[:, :, :end], v[:, :, :end], 0.0, False, attn_mask=mask, scale=scale
        )
    return out, lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, lengths: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each (B, H, L, D)."""
    B, H, L, D = q.shape
    dq, dk, dv = (q.new_empty(B, H, L, D) for _ in range(3))
    if q.numel() == 0:
        return dq, dk, dv
    parts = [(start, end, ~reference.mask(group)) for start, end, group in groups(lengths)][::-1]
    most = max((end - start) * end for start, end, _ in parts)
    heads = min(H, max(1, _SCORES.get(q.element_size(), 1 << 20) // most))
    scores = lse.new_empty(heads * most)
    weights = scores if q.dtype == lse.dtype else q.new_empty(heads * most)
    products = q.new_empty(heads * most)
    # One more column makes the product of queries and keys S - lse; in the dtype of lse, as P needs it exact.
    queries, keys = lse.new_empty(heads, L, D + 1), lse.new_ones(heads, L, D + 1)
    with torch.autocast("cpu", enabled=False):
        for b in range(B):
            for h in range(0, H, heads):
                n = min(heads, H - h)
                qh, kh, vh, doh, dqh, dkh, dvh = (x[b, h : h + n] for x in (q, k, v, do, dq, dk, dv))
                queries[:n, :, :D].copy_(qh).mul_(scale)
                queries[:n, :, D] = -lse[b, h : h + n]
                keys[:n, :, :D] = kh
                for i, (start, end, hidden) in enumerate(parts):
                    rows, shape = slice(start, end), (n, end - start, end)
                    size = n * (end - start) * end
                    P = scores[:size].view(shape)
                    torch.bmm(queries[:n, rows], keys[:n, :end].mT, out=P).exp_()
                    if hidden.any():
                        P[:, :, start:].masked_fill_(hidden, 0)
                    if weights is not scores:
                        P = weights[:size].view(shape).copy_(P)
                    dS = products[:size].view(shape)
                    torch.bmm(doh[:, rows], vh[:, :end].mT, out=dS)
                    torch._softmax_backward_data(dS, P, -1, q.dtype, grad_input=dS)
                    dqh[:, rows].baddbmm_(dS, kh[:, :end], beta=0, alpha=scale)
                    beta = min(i, 1)  # the first group sees every key, so it writes and the others add
                    dvh[:, :end].baddbmm_(P.mT, doh[:, rows], beta=beta)
                    dkh[:, :end].baddbmm_(dS.mT, qh[:, rows], beta=beta, alpha=scale)
    return dq, dk, dv
