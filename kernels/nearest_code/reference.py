"""This is the definition in plain PyTorch, in slices of `SCORES` scores; `op` gives the order of the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = 1 << 24  # scores held at a time: 64 MiB of float32


@torch.no_grad()
def nearest_code(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """See `op.nearest_code`. x: (N, D), codebook: (V, D), both float32 (or float64, for tests)."""
    bias = x.new_zeros(len(codebook))
    if metric == "cosine":
        codebook = F.normalize(codebook, dim=-1)
    else:
        bias = codebook.double().square().sum(-1).mul(-0.5).to(x.dtype)
    usable = codebook.isfinite().all(-1) & bias.isfinite()
    codebook, bias = codebook.where(usable[:, None], 0), bias.where(usable, float("-inf"))
    ids = torch.empty(len(x), dtype=torch.int64, device=x.device)
    rows = max(1, SCORES // len(codebook))
    with _full_precision(x.device.type):
        for part, chosen in zip(x.split(rows), ids.split(rows), strict=True):
            scores = torch.addmm(bias, part, codebook.T)
            # NaN would win argmax: the only rows to have one hold a NaN or an infinity, and theirs is index 0.
            chosen.copy_(scores.argmax(-1) * part.isfinite().all(-1))
    return ids


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Multiply in full float32, without autocast and without the TF32 or bfloat16 of a lower matmul precision."""
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)
