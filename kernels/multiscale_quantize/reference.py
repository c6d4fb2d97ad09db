"""This is the definition, in plain PyTorch: Tian et al. 2024 (arXiv:2404.02905), Algorithms 1 and 2.

Letters: B batch, D code dimension, (H, W) the latent grid, N scales, L tokens over all scales, Q convolutions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mars.kernels.multiscale_quantize.problem import Problem
from mars.kernels.nearest_code import PackedCodebook


def area_downsample(x: Tensor, scale: tuple[int, int]) -> Tensor:
    """Return x (B, D, H, W) on a coarser grid (B, D, *scale): the means of the cells that each new one touches."""
    return x if tuple(x.shape[2:]) == tuple(scale) else F.interpolate(x, size=tuple(scale), mode="area")


def look_up(ids: Tensor, codebook: Tensor, scale: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return the codes of one scale, up-sampled bicubically. ids: (B, h w). Returns (B, D, H, W)."""
    h = F.embedding(ids, codebook).transpose(1, 2).unflatten(2, scale)
    return h if scale == grid else F.interpolate(h, size=grid, mode="bicubic", align_corners=False)


def dequantize_scale(
    ids: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: tuple[int, int],
    grid: tuple[int, int],
    ratio: float,
) -> Tensor:
    """Compute what one scale adds to the latent: look up, up-sample bicubically, mix with its convolution.

    ids: (B, h w); weight: (D, D, 3, 3); bias: (D,). Returns (B, D, H, W).
    """
    h = look_up(ids, codebook, scale, grid)
    return torch.lerp(h, F.conv2d(h, weight, bias, padding=1), ratio)


def fold(weight: Tensor, ratio: float) -> Tensor:
    """Write the mix (1 - ratio) h + ratio phi(h) as one convolution, whose bias is ratio times phi's.

    weight: (Q, D, D, 3, 3). Returns its taps (Q, 3, 3, D, D), the last dimension the output's.
    """
    one = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    identity = F.pad(one[None, None], [0] * 4 + [1] * 4)
    return (weight.permute(0, 3, 4, 2, 1) * ratio + identity * (1 - ratio)).contiguous()


def multiscale_quantize(problem: Problem) -> tuple[Tensor, Tensor]:
    """See `op.multiscale_quantize`."""
    f, codebook, keep = problem.f, problem.codebook, problem.keep
    grid = (f.shape[2], f.shape[3])
    packed = PackedCodebook(codebook.detach().float(), problem.metric, "reference")
    residual = f.detach()
    total = torch.zeros_like(residual)
    ids, totals = [], []
    for k, (scale, q) in enumerate(zip(problem.scales, problem.phi_index, strict=True)):
        rows = area_downsample(residual, scale).permute(0, 2, 3, 1).reshape(-1, f.shape[1])
        ids_k = packed.search(rows).view(len(f), scale[0] * scale[1])
        h = dequantize_scale(ids_k, codebook, problem.weight[q], problem.bias[q], scale, grid, problem.ratio)
        residual = residual - h.detach()  # the whole chain, also of what `keep` leaves out
        total = total + (h if keep is None else h.where((keep > k).view(-1, 1, 1, 1), 0))
        ids.append(ids_k)
        totals.append(total)
    return torch.cat(ids, dim=1), torch.stack(totals)
