"""Modules with weights of their own, made of the operations: a quantiser and an attention for a model of your own.

The tokenizer and the transformer of MARS are built of these two (`mars.models`), which are those of VAR (Tian et al.
2024, arXiv:2404.02905).

Letters: B batch, D values of a code, (H, W) the grid, N scales, L tokens over all scales, V codes, Q convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mars.kernels.multiscale_quantize import area_downsample, dequantize_scale, multiscale_quantize
from mars.kernels.nearest_code.op import Metric
from mars.kernels.scale_causal_attention import cached_attention, scale_causal_attention
from mars.runtime import to_device


@dataclass(frozen=True, slots=True)
class Quantized:
    """What quantisation gives; `latent, ids, loss = quantized` takes the first three."""

    latent: Tensor  # (B, D, H, W), the sum of all kept scales; its gradient goes straight to the encoder
    ids: Tensor  # int64 (B, L)
    loss: Tensor  # (), codebook plus beta commitment, mean over the scales
    keep_mask: Tensor | None = None  # bool (B, N), the scales that quantiser dropout left; None: all
    residuals: Tensor | None = None  # (B, L, D), what each code was chosen for; only for training that asks for it

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.latent, self.ids, self.loss))


def phi_index(scales: int, count: int) -> list[int]:
    """Return which of `count` convolutions each scale uses: the nearest of evenly spread ticks (ties go up)."""
    offset = 1 / (3 * count) if count == 4 else 1 / (2 * count)
    step = (1 - 2 * offset) / max(count - 1, 1)
    place = [k / max(scales - 1, 1) for k in range(scales)]
    return [min(max(math.floor((p - offset) / step + 0.5 + 1e-9) if count > 1 else 0, 0), count - 1) for p in place]


class MultiScaleVQ(nn.Module):
    """Multi-scale residual vector quantiser with one codebook for all scales (Tian et al. 2024, §3.1).

    Its arithmetic is that of `mars.kernels.multiscale_quantize`. The codebook and the convolutions learn by the
    gradient of `Quantized.loss`; what precedes the quantiser gets the gradient of `Quantized.latent` as it is.

    Args:
        dim: D, channels of the map.
        codebook_size: V.
        scales: grids (h, w), coarse to fine, the last that of the map; a number n stands for (n, n).
        metric: how the nearest code is chosen: "l2", or "cosine".
        phi: Q convolutions after the up-sampling, which the scales share; None: VAR's 4, or N where that is less.
        ratio: share of the convolution in what a scale adds.
        beta: weight of the commitment term in the loss.
        dropout: share of the samples that keep only their first scales, in training mode.
        dropout_start: they keep at least this many.
        residuals: in training mode, also give what each code was chosen for.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        scales: Sequence[int | tuple[int, int]],
        *,
        metric: Metric = "cosine",
        phi: int | None = None,
        ratio: float = 0.5,
        beta: float = 0.25,
        dropout: float = 0.0,
        dropout_start: int = 1,
        residuals: bool = False,
    ) -> None:
        super().__init__()
        grids = tuple((s, s) if isinstance(s, int) else (s[0], s[1]) for s in scales)
        if not grids or min(min(grid) for grid in grids) < 1 or dim < 1 or codebook_size < 1:
            raise ValueError(
                f"MultiScaleVQ: want dim, codebook_size and the sides of one or more scales at least 1; "
                f"got {dim}, {codebook_size}, {list(scales)}"
            )
        phi = min(4, len(grids)) if phi is None else phi
        if not 1 <= phi <= len(grids) or not 1 <= dropout_start <= len(grids) or not 0 <= dropout <= 1:
            raise ValueError(
                f"MultiScaleVQ: want phi and dropout_start in 1..{len(grids)} (the number of scales) and dropout in "
                f"0..1; got {phi}, {dropout_start}, {dropout}"
            )
        self.scales = grids
        self.starts = list(accumulate((h * w for h, w in grids), initial=0))
        self.phi_index = phi_index(len(grids), phi)
        self.metric, self.ratio, self.beta = metric, ratio, beta
        self.dropout, self.dropout_start, self.wants_residuals = dropout, dropout_start, residuals
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim))
        self.phi_weight = nn.Parameter(torch.empty(phi, dim, dim, 3, 3))
        self.phi_bias = nn.Parameter(torch.empty(phi, dim))
        nn.init.normal_(self.codebook)
        with torch.no_grad():
            self.codebook.copy_(F.normalize(self.codebook, dim=-1))
        bound = 1 / math.sqrt(9 * dim)  # PyTorch's default for a convolution
        nn.init.uniform_(self.phi_weight, -bound, bound)
        nn.init.uniform_(self.phi_bias, -bound, bound)

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        codes, dim = self.codebook.shape
        scales = " ".join(f"{h}x{w}" for h, w in self.scales)
        return f"dim={dim}, codebook_size={codes}, scales={scales}, metric={self.metric}, phi={len(self.phi_bias)}"

    def forward(self, f: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Quantise the latent map f (B, D, H, W); in training mode some samples keep only their first scales.

        generator: CPU stream that draws the quantiser dropout (training mode only).
        """
        with torch.autocast(f.device.type, enabled=False):
            f = f.float()
            keep = to_device(self._draw_keep(len(f), generator), f.device) if self.training else None
            ids, totals = self.search(f, keep)
            dims = (2, 3, 4)
            codebook = (totals - f.detach()).square().mean(dims)  # (N, B)
            commitment = (totals.detach() - f).square().mean(dims)
            each = codebook + self.beta * commitment
            keep_mask = None
            if keep is None:
                loss = each.mean()
            else:  # a scale's loss is the mean over the samples that keep it
                keep_mask = keep > torch.arange(len(self.scales), device=f.device)[:, None]
                loss = ((each * keep_mask).sum(1) / keep_mask.sum(1).clamp_min(1)).mean()
                keep_mask = keep_mask.T
            residuals = self.residuals(f, totals) if self.training and self.wants_residuals else None
            return Quantized(f + (totals[-1] - f).detach(), ids, loss, keep_mask, residuals)

    def search(self, f: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the tokens (B, L) and running sums (N, B, D, H, W) of f; see `mars.kernels.multiscale_quantize`."""
        return multiscale_quantize(
            f,
            self.codebook.float(),
            self.phi_weight.float(),
            self.phi_bias.float(),
            self.phi_index,
            self.scales,
            metric=self.metric,
            ratio=self.ratio,
            keep=keep,
        )

    @torch.no_grad()
    def residuals(self, f: Tensor, totals: Tensor) -> Tensor:
        """Return the residual (B, L, D) that each token stands for, from f and the running sums (N, B, D, H, W).

        For a scale that quantiser dropout left out, it is the residual after the sample's last kept scale.
        """
        before = [torch.zeros_like(f), *totals[:-1]]
        rows = [area_downsample(f - t, s).flatten(2) for t, s in zip(before, self.scales, strict=True)]
        return torch.cat(rows, dim=2).transpose(1, 2)

    def _draw_keep(self, batch: int, generator: torch.Generator | None) -> Tensor:
        """Draw how many scales each sample keeps, int64 (B,); per sample, so that it also works at batch 1."""
        n = len(self.scales)
        drop = torch.rand(batch, generator=generator) < self.dropout
        return torch.where(drop, torch.randint(self.dropout_start, n + 1, (batch,), generator=generator), n)

    def add_scale(self, k: int, ids: Tensor, total: Tensor | None) -> Tensor:
        """Return the running sum (B, D, H, W) after scale k's ids (B, h_k w_k); total None: start from zero."""
        j = self.phi_index[k]
        weight, bias, grid = self.phi_weight[j], self.phi_bias[j], self.scales[-1]
        with torch.autocast(ids.device.type, enabled=False):
            h = dequantize_scale(ids, self.codebook, weight, bias, self.scales[k], grid, self.ratio)
        return h if total is None else total + h

    def latent(self, ids: Tensor) -> Tensor:
        """Return the latent map (B, D, H, W) of the tokens (B, L)."""
        total = None
        for k, (start, end) in enumerate(pairwise(self.starts)):
            total = self.add_scale(k, ids[:, start:end], total)
        assert total is not None
        return total

    def next_input(self, k: int, total: Tensor) -> Tensor:
        """Return VAR's input (B, h w, D) for scale k >= 1: the running sum, area-down-sampled to that scale."""
        return area_downsample(total, self.scales[k]).flatten(2).transpose(1, 2)

    def teacher_inputs(self, ids: Tensor) -> Tensor:
        """Return VAR's inputs (B, L - n_1, D) for all scales but the first, from the true tokens (B, L)."""
        starts, total, inputs = self.starts, None, []
        for k in range(len(self.scales) - 1):
            total = self.add_scale(k, ids[:, starts[k] : starts[k + 1]], total)
            inputs.append(self.next_input(k + 1, total))
        if not inputs:
            return self.codebook.new_zeros(len(ids), 0, self.codebook.shape[1])
        return torch.cat(inputs, dim=1)


class ScaleCausalAttention(nn.Module):
    """Multi-head self-attention, in which a token sees the tokens of its own and of all coarser scales (VAR's, §3.2).

    Queries and keys are divided by their norms; each head learns the factor of its scores, which starts at 4 and stops
    at 100. There is no bias on the keys.

    Args:
        dim: W, channels of a token.
        heads: a divisor of W.
        lengths: tokens of each scale, coarse to fine; they add up to L.

    Raises:
        ValueError: heads do not divide dim, or a length is below 1.
    """

    def __init__(self, dim: int, heads: int, lengths: Sequence[int]) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads or not lengths or min(lengths) < 1:
            raise ValueError(
                f"ScaleCausalAttention: want heads that divide dim, and one or more scales of 1 or more tokens; "
                f"got dim {dim}, heads {heads}, lengths {list(lengths)}"
            )
        self.heads, self.lengths = heads, tuple(lengths)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, start: int = 0) -> Tensor:
        """Return the attention's output, of the shape of x.

        Args:
            x: (B, L, W), the tokens of all scales or, with a cache, (B, n, W), those of one scale.
            cache: of `new_cache`, which gets the keys and values of x; it is for generation, without gradients.
            start: tokens of the coarser scales, whose keys and values the cache holds already.
        """
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        head_scale = self.log_scale.clamp_max(math.log(100)).exp().flatten()
        if cache is None:
            y = scale_causal_attention(q, k, v, self.lengths, head_scale=head_scale)
        else:
            y = cached_attention(q, k, v, *cache, start, head_scale=head_scale)
        return self.proj(y.transpose(1, 2).flatten(2))

    def new_cache(self, batch: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return room for the keys and values of all L tokens; dtype None: that of the weights."""
        shape = (batch, self.heads, sum(self.lengths), len(self.q_bias) // self.heads)
        empty = self.q_bias.new_empty(shape, dtype=dtype, requires_grad=False)
        return empty, torch.empty_like(empty)
