"""The arguments of `multiscale_quantize` are one value, which every implementation takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor

from mars.kernels.multiscale_quantize.resampling import Grid
from mars.kernels.nearest_code.op import Metric

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, eq=False, slots=True)
class Problem:
    """The fields are the arguments of `op.multiscale_quantize`, which says what they mean, in its order."""

    f: Tensor  # (B, D, H, W)
    codebook: Tensor  # (V, D)
    weight: Tensor  # (Q, D, D, 3, 3)
    bias: Tensor  # (Q, D)
    phi_index: Sequence[int]  # for each scale: which convolution
    scales: list[Grid]
    metric: Metric
    ratio: float
    keep: Tensor | None  # (B,)

    def check(self) -> None:
        """Raise ValueError where shapes, dtypes, devices or scales do not fit, or the metric is unknown."""
        f, codebook, weight, bias, keep = self.f, self.codebook, self.weight, self.bias, self.keep
        scales, phi_index = self.scales, self.phi_index
        if f.ndim != 4 or codebook.ndim != 2 or f.shape[1] != codebook.shape[1] or 0 in codebook.shape:
            raise ValueError(
                f"multiscale_quantize: want f (B, D, H, W) and codebook (V, D), D and V at least 1; "
                f"got {tuple(f.shape)}, {tuple(codebook.shape)}"
            )
        dim, height, width = f.shape[1:]
        if weight.shape[1:] != (dim, dim, 3, 3) or bias.shape != (len(weight), dim):
            raise ValueError(
                f"multiscale_quantize: want weight (Q, {dim}, {dim}, 3, 3) and bias (Q, {dim}); "
                f"got {tuple(weight.shape)}, {tuple(bias.shape)}"
            )
        others = (codebook, weight, bias)
        if f.dtype not in (torch.float32, torch.float64) or any(t.dtype != f.dtype for t in others):
            raise ValueError(
                "multiscale_quantize: want f, codebook, weight and bias all float32 or all float64; "
                f"got {', '.join(str(t.dtype) for t in (f, *others))}"
            )
        if any(t.device != f.device for t in (*others, *([] if keep is None else [keep]))):
            raise ValueError(f"multiscale_quantize: want all tensors on f's device, {f.device}")
        if not scales or tuple(scales[-1]) != (height, width) or len(phi_index) != len(scales):
            raise ValueError(
                f"multiscale_quantize: the last of the scales {tuple(scales)} must be f's grid {(height, width)} "
                f"and phi_index needs one entry per scale, got {len(phi_index)}"
            )
        if any(not (1 <= h <= height and 1 <= w <= width) for h, w in scales):
            raise ValueError(
                f"multiscale_quantize: want scales within (1, 1)..{(height, width)}, f's grid, got {tuple(scales)}"
            )
        if any(a > b for coarse, fine in pairwise(scales) for a, b in zip(coarse, fine, strict=True)):
            raise ValueError(
                f"multiscale_quantize: want scales coarse to fine, none smaller than the one before; got {scales}"
            )
        if any(not 0 <= q < len(weight) for q in phi_index):
            raise ValueError(f"multiscale_quantize: want phi_index in 0..{len(weight) - 1}, got {list(phi_index)}")
        if self.metric not in get_args(Metric):
            raise ValueError(f"multiscale_quantize: metric must be l2 or cosine, got {self.metric!r}")
        if keep is not None and (keep.shape != f.shape[:1] or keep.dtype not in _INTEGERS):
            raise ValueError(
                f"multiscale_quantize: want keep ({len(f)},) of integers, got {tuple(keep.shape)} of {keep.dtype}"
            )

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Return uninitialised ids (B, L) and running sums (N, B, D, H, W)."""
        ids = self.f.new_empty((len(self.f), sum(h * w for h, w in self.scales)), dtype=torch.int64)
        return ids, self.f.new_empty((len(self.scales), *self.f.shape))
