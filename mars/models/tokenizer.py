"""Tokenizer: ViT encoder with learnable tokens, multi-scale residual VQ, ViT decoder (MARS §2.2, Figure 2).

The encoder reads the K_f x K_t patches of a CMX tensor followed by S learnable tokens and keeps those S; the decoder
reads K_f x K_t copies of one mask token followed by the S quantised tokens and keeps the patches. All attend to all.
We leave out the class token of DINOv2, which nothing reads.

Letters: B batch, C CMX channels, (F, T) CMX grid, K patches, S latent tokens, W width, D code dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mars.config import Config, Pair, TokenizerConfig
from mars.errors import ConfigError
from mars.kernels import attention
from mars.models.quantizer import Quantized, Quantizer
from mars.runtime import to_device

REFINED_AT_ONCE = 8  # notes, whose activations take some 200 MB with the preset `notes`
REFINE_RATE, REFINE_BETAS = 0.03, (0.9, 0.95)  # step size relative to the spread of a note's latent map; Adam's decays


class Attention(nn.Module):
    """Multi-head self-attention without a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block of DINOv2: exact GELU, optional LayerScale, stochastic depth."""

    def __init__(self, width: int, heads: int, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale1 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
        self.scale2 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return (B, n, W) of x (B, n, W); keep: (2, B, 1, 1), each branch's factor per sample (stochastic depth)."""
        for i, (branch, scale) in enumerate(((self._attend, self.scale1), (self._transform, self.scale2))):
            y = branch(x)
            y = y if scale is None else y * scale
            x = x + (y if keep is None else y * keep[i])
        return x

    def _attend(self, x: Tensor) -> Tensor:
        return self.attn(self.norm1(x))

    def _transform(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))


def drop_path(depth: int, batch: int, rate: float, generator: torch.Generator | None) -> Tensor | None:
    """Draw stochastic-depth factors (depth, 2, B, 1, 1); the drop rate grows linearly to `rate`. None if that is 0."""
    if rate == 0:
        return None
    keep = 1 - torch.linspace(0, rate, depth).view(depth, 1, 1)
    mask = torch.rand(depth, 2, batch, generator=generator) < keep
    return (mask / keep)[..., None, None]


def recomputed(block: nn.Module, *arguments: Any) -> Tensor:
    """Return `block(*arguments)`; the backward recomputes its activations (Chen et al. 2016, arXiv:1604.06174).

    Random numbers must be among the arguments, as stochastic depth's factors are.
    """
    return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)


class ViT(nn.Module):
    """Transformer over two groups of tokens: the patch grid and the latent grid, told apart by a level embedding."""

    checkpointing = False  # in training mode: see `recomputed`

    def __init__(self, config: TokenizerConfig, patches: Pair) -> None:
        super().__init__()
        self.rate = config.drop_path
        self.patches, self.latent = patches, config.latent
        width = config.width
        self.position = nn.Parameter(torch.empty(1, patches[0] * patches[1], width))
        self.level = nn.Parameter(torch.empty(2, 1, width))
        self.blocks = nn.ModuleList(Block(width, config.heads, config.layer_scale) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for p in (self.position, self.level):
            nn.init.trunc_normal_(p, std=(1 / (3 * width)) ** 0.5)

    def forward(self, patch: Tensor, latent: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return patch (B, K, W) and latent (B, S, W) after all blocks and the last norm."""
        position: Tensor = self.position
        if self.latent != self.patches:  # the same positions, resampled to the other grid
            grid = position.transpose(1, 2).unflatten(2, self.patches)
            position = F.interpolate(grid.float(), size=self.latent, mode="bicubic", align_corners=False)
            position = position.flatten(2).transpose(1, 2)
        x = torch.cat((patch + self.position + self.level[0], latent + position + self.level[1]), dim=1)
        keep = drop_path(len(self.blocks), len(x), self.rate, generator) if self.training else None
        if keep is not None:
            keep = to_device(keep.to(x.dtype), x.device)
        for i, block in enumerate(self.blocks):
            arguments = x, None if keep is None else keep[i]
            x = recomputed(block, *arguments) if self.training and self.checkpointing else block(*arguments)
        x = self.norm(x)
        return x[:, : patch.shape[1]], x[:, patch.shape[1] :]


class Tokenizer(nn.Module):
    """CMX tensor (B, C, F, T) <-> tokens (B, L)."""

    def __init__(self, config: Config | TokenizerConfig, shape: tuple[int, int, int] | None = None) -> None:
        """Make a tokenizer of a whole model's settings, or of its own for tensors of any shape (C, F, T).

        Raises:
            ConfigError: the patch does not divide the shape.
        """
        super().__init__()
        if isinstance(config, Config):
            shape, config = config.audio.shape, config.tokenizer
        if shape is None:
            raise ConfigError("a tokenizer's own settings do not say what it reads; give its shape (C, F, T)")
        t = config
        self.channels, *grid = shape
        if grid[0] % t.patch[0] or grid[1] % t.patch[1]:
            raise ConfigError(f"tokenizer.patch {t.patch} must divide the grid {tuple(grid)}")
        self.patch, self.patches = t.patch, (grid[0] // t.patch[0], grid[1] // t.patch[1])
        values = self.channels * t.patch[0] * t.patch[1]
        self.embed = nn.Linear(values, t.width)
        self.queries = nn.Parameter(torch.randn(1, t.latent[0] * t.latent[1], t.width) * 1e-6)
        self.encoder = ViT(t, self.patches)
        self.to_code = nn.Linear(t.width, t.code_dim)
        self.quantizer = Quantizer(t)
        self.from_code = nn.Linear(t.code_dim, t.width)
        self.mask = nn.Parameter(torch.randn(1, 1, t.width) * 1e-6)
        self.decoder = ViT(t, self.patches)
        self.head = nn.Linear(t.width, values)
        self.apply(lambda module: _initialise(module, 0.02 * (768 / t.width) ** 0.5))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Quantized]:
        """Reconstruct x (B, C, F, T) through the quantiser.

        generator: CPU stream for stochastic depth and quantiser dropout (training mode only).
        """
        quantized = self.quantizer(self.latent(x, generator), generator)
        return self.reconstruct(quantized.latent, generator), quantized

    def latent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the encoder's map (B, D, H, W), float32, before quantisation."""
        (p, q), (k, l) = self.patch, self.patches
        patches = x.unflatten(3, (l, q)).unflatten(2, (k, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        _, z = self.encoder(self.embed(patches), self.queries.expand(len(x), -1, -1), generator)
        return self.to_code(z).float().transpose(1, 2).unflatten(2, self.quantizer.scales[-1])

    def reconstruct(self, latent: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the CMX tensor (B, C, F, T) of a quantised map (B, D, H, W); not clamped."""
        tokens = self.from_code(latent.flatten(2).transpose(1, 2))
        mask = self.mask.expand(len(latent), self.patches[0] * self.patches[1], -1)
        y, _ = self.decoder(mask, tokens, generator)
        y = self.head(y).float().unflatten(2, (self.channels, *self.patch)).unflatten(1, self.patches)
        return y.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def encode(self, x: Tensor) -> Tensor:
        """Encode a CMX tensor (B, C, F, T) to tokens int64 (B, L)."""
        return self.quantizer(self.latent(x)).ids

    def refine(self, x: Tensor, steps: int) -> Tensor:
        """Tokens int64 (B, L) whose decoded CMX tensor is nearer to x (B, C, F, T) than that of `encode`'s, or these.

        The encoder guesses the latent map in one pass. From there Adam descends the error of what the decoder makes of
        the quantised map, through the quantiser straight to the map itself; the weights stay as they are. Of all tokens
        on the way each note gets those with the least error. A step takes a forward and a backward pass of the decoder.
        """
        if not len(x):
            return self.encode(x)
        return torch.cat([self._refine(part, steps) for part in x.split(REFINED_AT_ONCE)])

    def _refine(self, x: Tensor, steps: int) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone()  # one that autograd takes, whatever mode it was made in
            with torch.no_grad():
                z = self.latent(x)
            z = z.clone().requires_grad_()
            reach = z.detach().std(dim=(1, 2, 3), correction=0, keepdim=True)  # of each note
            mean, square = torch.zeros_like(z), torch.zeros_like(z)
            ids, least = None, x.new_full((len(x),), torch.inf)
            for step in range(steps + 1):
                with torch.no_grad():
                    tokens, totals = self.quantizer.search(z)
                    gap = totals[-1] - z
                each = (self.reconstruct(z + gap) - x).square().mean((1, 2, 3))
                better = each.detach() < least
                ids = tokens if ids is None else torch.where(better[:, None], tokens, ids)
                least = torch.where(better, each.detach(), least)
                if step == steps:
                    break
                (gradient,) = torch.autograd.grad(each.sum(), z)
                # And towards the quantised map, or the map would leave what the codes can say.
                gradient -= 2 / z[0].numel() * gap
                a, b = REFINE_BETAS
                mean, square = mean.lerp(gradient, 1 - a), square.lerp(gradient.square(), 1 - b)
                direction = mean / (1 - a ** (step + 1)) / (square / (1 - b ** (step + 1))).sqrt().clamp_min(1e-12)
                rate = REFINE_RATE * (1 - step / steps) ** 0.5
                z = (z.detach() - rate * reach * direction).requires_grad_()
            assert ids is not None
            return ids

    def decode(self, ids: Tensor) -> Tensor:
        """Return the CMX tensor (B, C, F, T) in [-1, 1] of the tokens (B, L)."""
        return self.reconstruct(self.quantizer.latent(ids)).clamp(-1, 1)


def _initialise(module: nn.Module, std: float) -> None:
    # 0.02 is DINOv2's value at width 768. A narrow net with it starts out giving every note almost the same codes.
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)
