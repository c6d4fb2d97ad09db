"""Scale-causal attention on a CPU: PyTorch's fused forward, and a backward of plain matrix products.

The fused forward reads q, k and v once and keeps its scores in float32, in bfloat16 too. Its backward is the slow half,
in bfloat16 above all, where it does not reach the matrix units. Here the weights P are computed again, in float32, and
the rest is the softmax's gradient (Dao et al. 2022, arXiv:2205.14135, appendix B.2):
dV = P' dO, dP = dO V', dS = P (dP - sum P dP), dQ = dS K, dK = dS' Q.

Letters: B batch, H heads, L tokens, D values per head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mars.kernels.scale_causal_attention import backends, reference

_SCORES = {4: 1 << 20, 2: 1 << 22}  # held at a time, by bytes of a value: a product in bfloat16 costs more to start


def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """(B, H, L, D), laid out as (B, L, H, D)."""
    B, H, L, D = q.shape
    out = q.new_empty(B, L, H, D).transpose(1, 2)
    return out.copy_(backends.grouped(q, k, v, lengths, scale))


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each (B, H, L, D)."""
    B, H, L, D = q.shape
    dq, dk, dv = (q.new_empty(B, H, L, D) for _ in range(3))
    if q.numel() == 0:
        return dq, dk, dv
    exact = torch.promote_types(q.dtype, torch.float32)
    parts = [(start, end, ~reference.mask(group)) for start, end, group in backends.groups(lengths)][::-1]
    most = max((end - start) * end for start, end, _ in parts)
    heads = min(H, max(1, _SCORES.get(q.element_size(), 1 << 20) // most))
    scores = q.new_empty(heads * most, dtype=exact)
    weights, products = (q.new_empty(heads * most) for _ in range(2))
    with torch.autocast("cpu", enabled=False):
        for b in range(B):
            for h in range(0, H, heads):
                n = min(heads, H - h)
                qh, kh, vh, doh, dqh, dkh, dvh = (x[b, h : h + n] for x in (q, k, v, do, dq, dk, dv))
                queries, keys = qh.to(exact), kh.to(exact)
                for i, (start, end, hidden) in enumerate(parts):
                    rows, seen, shape = slice(start, end), slice(end), (n, end - start, end)
                    size = n * (end - start) * end
                    S = scores[:size].view(shape)
                    S.baddbmm_(queries[:, rows], keys[:, seen].mT, beta=0, alpha=scale)
                    S[:, :, start:].masked_fill_(hidden, float("-inf"))
                    torch.softmax(S, dim=-1, out=S)
                    P = S if q.dtype == exact else weights[:size].view(shape).copy_(S)
                    dS = products[:size].view(shape)
                    torch.bmm(doh[:, rows], vh[:, seen].mT, out=dS)
                    torch._softmax_backward_data(dS, P, -1, q.dtype, grad_input=dS)
                    dqh[:, rows].baddbmm_(dS, kh[:, seen], beta=0, alpha=scale)
                    beta = min(i, 1)  # the first group sees every key, so it writes and the others add
                    dvh[:, seen].baddbmm_(P.mT, doh[:, rows], beta=beta)
                    dkh[:, seen].baddbmm_(dS.mT, qh[:, rows], beta=beta, alpha=scale)
    return dq, dk, dv
