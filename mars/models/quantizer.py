"""Multi-scale residual vector quantiser with one codebook for all scales (Tian et al. 2024, §3.1).

Letters: B batch, D code dimension, (H, W) latent grid, N scales, L tokens over all scales, V codebook size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mars.config import TokenizerConfig
from mars.kernels import area_downsample, dequantize_scale, multiscale_quantize
from mars.runtime import to_device


@dataclass(frozen=True, slots=True)
class Quantized:
    """The result of `Quantizer.forward`."""

    ids: Tensor  # int64 (B, L)
    latent: Tensor  # (B, D, H, W), the sum of all kept scales; its gradient goes straight to the encoder
    loss: Tensor  # (), codebook plus beta commitment, mean over the scales
    keep_mask: Tensor | None = None  # bool (B, N), the scales that quantiser dropout left; None: all
    residuals: Tensor | None = None  # (B, L, D), what each code was chosen for; only for training that asks for it


def phi_index(scales: int, count: int) -> list[int]:
    """Return which of `count` convolutions each scale uses: the nearest of evenly spread ticks (ties go up)."""
    offset = 1 / (3 * count) if count == 4 else 1 / (2 * count)
    step = (1 - 2 * offset) / max(count - 1, 1)
    place = [k / max(scales - 1, 1) for k in range(scales)]
    return [min(max(math.floor((p - offset) / step + 0.5 + 1e-9) if count > 1 else 0, 0), count - 1) for p in place]


class Quantizer(nn.Module):
    """Codebook and convolutions; the rules are those of `mars.kernels.multiscale_quantize`."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.scales, self.starts = config.scales, config.starts
        self.phi_index = phi_index(len(config.scales), config.phi)
        dim = config.code_dim
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, dim))
        self.phi_weight = nn.Parameter(torch.empty(config.phi, dim, dim, 3, 3))
        self.phi_bias = nn.Parameter(torch.empty(config.phi, dim))
        nn.init.normal_(self.codebook)
        with torch.no_grad():
            self.codebook.copy_(F.normalize(self.codebook, dim=-1))
        bound = 1 / math.sqrt(9 * dim)  # PyTorch's default for a convolution
        nn.init.uniform_(self.phi_weight, -bound, bound)
        nn.init.uniform_(self.phi_bias, -bound, bound)
        if config.ema_codebook:
            self.codebook.requires_grad_(False)  # the codebook term of the loss then trains the convolutions alone

    def forward(self, f: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Quantise the latent map f (B, D, H, W); in training mode some samples keep only their first scales.

        generator: CPU stream that draws the quantiser dropout (training mode only).
        """
        c = self.config
        with torch.autocast(f.device.type, enabled=False):
            f = f.float()
            keep = to_device(self._draw_keep(len(f), generator), f.device) if self.training else None
            ids, totals = self.search(f, keep)
            dims = (2, 3, 4)
            codebook = (totals - f.detach()).square().mean(dims)  # (N, B)
            commitment = (totals.detach() - f).square().mean(dims)
            each = codebook + c.beta * commitment
            keep_mask = None
            if keep is None:
                loss = each.mean()
            else:  # a scale's loss is the mean over the samples that keep it
                keep_mask = keep > torch.arange(len(self.scales), device=f.device)[:, None]
                loss = ((each * keep_mask).sum(1) / keep_mask.sum(1).clamp_min(1)).mean()
                keep_mask = keep_mask.T
            wanted = self.training and (c.ema_codebook or c.restart_dead_codes > 0)
            residuals = self.residuals(f, totals) if wanted else None
            return Quantized(ids, f + (totals[-1] - f).detach(), loss, keep_mask, residuals)

    def search(self, f: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the tokens (B, L) and running sums (N, B, D, H, W) of f; see `mars.kernels.multiscale_quantize`."""
        return multiscale_quantize(
            f,
            self.codebook.float(),
            self.phi_weight.float(),
            self.phi_bias.float(),
            self.phi_index,
            self.scales,
            metric=self.config.metric,
            ratio=self.config.phi_ratio,
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
        c, n = self.config, len(self.scales)
        drop = torch.rand(batch, generator=generator) < c.quantizer_dropout
        return torch.where(drop, torch.randint(c.dropout_start, n + 1, (batch,), generator=generator), n)

    def add_scale(self, k: int, ids: Tensor, total: Tensor | None) -> Tensor:
        """Return the running sum (B, D, H, W) after adding scale k's ids (B, h_k w_k); total None: start from zero."""
        j = self.phi_index[k]
        with torch.autocast(ids.device.type, enabled=False):
            h = dequantize_scale(
                ids,
                self.codebook,
                self.phi_weight[j],
                self.phi_bias[j],
                self.scales[k],
                self.scales[-1],
                self.config.phi_ratio,
            )
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
            return self.codebook.new_zeros(len(ids), 0, self.config.code_dim)
        return torch.cat(inputs, dim=1)
