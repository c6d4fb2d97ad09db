"""The definition, in plain PyTorch; holds the whole (N, V) score matrix."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def nearest_code(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """`torch.argmin` of the squared distance less |x|^2, or `torch.argmax` of the cosine. See `op.nearest_code`."""
    x, codebook = x.float(), codebook.float()
    if metric == "cosine":
        return (F.normalize(x, dim=-1) @ F.normalize(codebook, dim=-1).T).argmax(dim=-1)
    return (codebook.square().sum(-1) - 2 * (x @ codebook.T)).argmin(dim=-1)
