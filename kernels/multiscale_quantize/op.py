"""Contract of `multiscale_quantize`: the coarse-to-fine residual quantiser of VAR."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mars.kernels.multiscale_quantize import reference
from mars.kernels.multiscale_quantize.reference import dequantize_scale as dequantize_scale
from mars.kernels.nearest_code.op import Metric


def multiscale_quantize(
    f: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor,
    phi_index: Sequence[int],
    scales: Sequence[tuple[int, int]],
    *,
    metric: Metric = "l2",
    ratio: float = 0.5,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise a latent map coarse to fine (Tian et al. 2024, Algorithm 1).

    For each scale: area down-sampling of the residual, nearest code, bicubic up-sampling, (1 - ratio) h + ratio phi(h),
    and subtraction. The search sees no gradient; the running sums are differentiable in codebook, weight and bias.

    Args:
        f: (B, D, H, W) float32; only its values are used.
        codebook: (V, D) float32.
        weight, bias: (Q, D, D, 3, 3), (Q, D): the convolutions phi.
        phi_index: for each scale, which of them it uses.
        scales: N grids (h, w), coarse to fine, the last (H, W).
        metric: how the nearest code is chosen; the raw row is what is added either way.
        keep: (B,) int, samples b add only scales k < keep[b] to their sums (quantiser dropout); None: all.

    Returns:
        ids: int64 (B, L), scale after scale, each row-major.
        totals: (N, B, D, H, W), the sum of the first 1..N scales.

    Raises:
        ValueError: shapes or scales do not fit.
    """
    if f.ndim != 4 or codebook.ndim != 2 or f.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"multiscale_quantize: want f (B, D, H, W) and codebook (V, D); "
            f"got {tuple(f.shape)}, {tuple(codebook.shape)}"
        )
    if tuple(scales[-1]) != tuple(f.shape[2:]) or len(phi_index) != len(scales):
        raise ValueError(
            f"multiscale_quantize: the last of the scales {tuple(scales)} must be f's grid {tuple(f.shape[2:])} "
            f"and phi_index needs one entry per scale, got {len(phi_index)}"
        )
    return reference.multiscale_quantize(f, codebook, weight, bias, phi_index, scales, metric, ratio, keep)
