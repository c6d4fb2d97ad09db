"""The training steps of the published VAR (arXiv:2404.02905) and ImageFolder (arXiv:2410.01756), as they are described.

A transcription from descriptions, in plain PyTorch, to be timed beside our own steps on the same weights and numbers.
It reads the parameters of our modules and calls none of our operations. What is done as published:

- Quantiser: per scale the codebook is normalised anew and all N x V similarities are computed in float32; the loss of
  each scale is in the autograd graph; ImageFolder counts the use of the codes per scale and step, and reads it.
- VAR: every step encodes the spectrograms outside autocast; a dense additive mask; queries and keys normalised in
  float32; float32 logits of all tokens, their cross-entropy, and the accuracy from their argmax; fused AdamW, and no
  average of the weights.
- Tokenizer: before the discriminator's start its terms are computed all the same and multiplied by 0; AdamW with
  PyTorch's defaults; the average of the weights in a Python loop.

Letters: B batch, D code dimension, N scales, n_k tokens of scale k, L tokens in all, W width, V codebook size.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mars.config import AudioConfig, Config
from mars.models import tokenizer as ours
from mars.models.discriminator import Discriminator
from mars.models.quantizer import Quantizer
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR
from mars.models.var import Block as VARBlock
from mars.runtime import autocast


def spectrogram(waveform: Tensor, config: AudioConfig) -> Tensor:
    """CMX tensors (B, C, F, T), in [-1, 1], of waveforms (B, samples)."""
    padded = F.pad(waveform[:, : config.samples], (0, (config.frames - 1) * config.hop - config.samples))
    window = torch.hann_window(config.n_fft, device=waveform.device)
    spectrum = torch.stft(padded, config.n_fft, config.hop, window=window, pad_mode="constant", return_complex=True)
    below = 1 if config.drop == "dc" else 0
    decibels = 20 * torch.log10(spectrum[:, below : below + config.bins].abs() + 10 ** (config.min_db / 20))
    x = (2 * (decibels - config.min_db) / (config.max_db - config.min_db) - 1).clamp_max(1)
    (r_f, r_t), (_, height, width) = config.cmx, config.shape
    return x.view(len(x), height, r_f, width, r_t).permute(0, 2, 4, 1, 3).flatten(1, 2)


def attend(attention: ours.Attention, x: Tensor) -> Tensor:
    """Self-attention of a ViT block: (B, n, W) to (B, n, W)."""
    q, k, v = attention.qkv(x).unflatten(2, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def vit(model: ours.ViT, patch: Tensor, latent: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """patch: (B, K, W), latent: (B, S, W) to the same; keep: (depth, 2, B, 1, 1), stochastic depth."""
    grid = model.position.transpose(1, 2).unflatten(2, model.patches)
    position = F.interpolate(grid, size=model.latent, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    x = torch.cat((patch + model.position + model.level[0], latent + position + model.level[1]), dim=1)
    for i, module in enumerate(model.blocks):
        block = cast(ours.Block, module)
        for j, branch in enumerate((lambda b, x: attend(b.attn, b.norm1(x)), lambda b, x: b.mlp(b.norm2(x)))):
            y = branch(block, x)
            scale = (block.scale1, block.scale2)[j]
            y = y if scale is None else y * scale
            x = x + (y if keep is None else y * keep[i, j])
    x = model.norm(x)
    return x[:, : patch.shape[1]], x[:, patch.shape[1] :]


def encode(model: Tokenizer, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """The encoder's map (B, D, H, W), float32, of a CMX tensor (B, C, F, T)."""
    (p, q), (k, l) = model.patch, model.patches
    patches = x.unflatten(3, (l, q)).unflatten(2, (k, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    _, z = vit(model.encoder, model.embed(patches), model.queries.expand(len(x), -1, -1), keep)
    return model.to_code(z).float().transpose(1, 2).unflatten(2, model.quantizer.scales[-1])


def decode(model: Tokenizer, latent: Tensor, keep: Tensor | None = None) -> Tensor:
    """The CMX tensor (B, C, F, T) of a quantised map (B, D, H, W)."""
    tokens = model.from_code(latent.flatten(2).transpose(1, 2))
    mask = model.mask.expand(len(latent), model.patches[0] * model.patches[1], -1)
    y, _ = vit(model.decoder, mask, tokens, keep)
    y = model.head(y).float().unflatten(2, (model.channels, *model.patch)).unflatten(1, model.patches)
    return y.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def restored(quantizer: Quantizer, k: int, ids: Tensor) -> Tensor:
    """What scale k adds to the map: codes (B, n_k) up-sampled and convolved, (B, D, H, W)."""
    j, ratio = quantizer.phi_index[k], quantizer.config.phi_ratio
    h = F.embedding(ids, quantizer.codebook).transpose(1, 2).unflatten(2, quantizer.scales[k])
    h = F.interpolate(h, size=quantizer.scales[-1], mode="bicubic", align_corners=False)
    return (1 - ratio) * h + ratio * F.conv2d(h, quantizer.phi_weight[j], quantizer.phi_bias[j], padding=1)


def quantize(quantizer: Quantizer, f: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The quantised map with its straight-through gradient, the loss, and the ids (B, n_k) of each scale."""
    residual, total = f.detach().clone(), torch.zeros_like(f)
    loss, ids = torch.zeros((), device=f.device), []
    for k, scale in enumerate(quantizer.scales):
        z = F.interpolate(residual, size=scale, mode="area").permute(0, 2, 3, 1).flatten(0, 2)
        similarity = F.normalize(z, dim=-1) @ F.normalize(quantizer.codebook.detach(), dim=-1).T  # (B n_k, V)
        ids.append(similarity.argmax(dim=1).view(len(f), -1))
        h = restored(quantizer, k, ids[-1])
        total = total + h
        residual = residual - h.detach()
        loss = loss + F.mse_loss(total, f.detach()) + quantizer.config.beta * F.mse_loss(total.detach(), f)
    return f + (total - f).detach(), loss / len(quantizer.scales), ids


@torch.no_grad()
def teacher_inputs(quantizer: Quantizer, ids: list[Tensor]) -> Tensor:
    """VAR's inputs (B, L - n_1, D)."""
    total = torch.zeros(len(ids[0]), quantizer.codebook.shape[1], *quantizer.scales[-1], device=ids[0].device)
    inputs = []
    for k in range(len(ids) - 1):
        total = total + restored(quantizer, k, ids[k])
        inputs.append(F.interpolate(total, size=quantizer.scales[k + 1], mode="area").flatten(2).transpose(1, 2))
    return torch.cat(inputs, dim=1)


def additive_mask(lengths: list[int]) -> Tensor:
    """(1, 1, L, L): 0 where a query may see a key, else minus infinity."""
    scale = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.where(scale[:, None] >= scale, 0.0, float("-inf"))[None, None]


def var_block(block: VARBlock, x: Tensor, modulation: Tensor, mask: Tensor, keep: Tensor | None) -> Tensor:
    """One AdaLN block: x (B, L, W), modulation (B, 1, 6, W)."""
    gain1, gain2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
    attention = block.attn
    bias = torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias))
    y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (scale1 + 1) + shift1
    qkv = F.linear(y, attention.qkv.weight, bias).unflatten(2, (3, attention.heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    head_scale = attention.log_scale.clamp_max(4.605170185988092).exp()
    q = (F.normalize(q.float(), dim=-1) * head_scale).to(v.dtype)
    k = F.normalize(k.float(), dim=-1).to(v.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(v.dtype), scale=1.0)
    y = attention.proj(y.transpose(1, 2).flatten(2)) * gain1
    x = x + (y if keep is None else y * keep[0])
    y = block.mlp(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (scale2 + 1) + shift2) * gain2
    return x + (y if keep is None else y * keep[1])


class VARStep:
    """The published step of the VAR."""

    def __init__(self, config: Config, tokenizer: Tokenizer, model: VAR) -> None:
        self.config, self.tokenizer, self.model = config, tokenizer, model
        self.device = model.position.device
        self.mask = additive_mask(model.lengths).to(self.device)
        train = config.train.var
        plain = [p for name, p in model.named_parameters() if p.ndim == 1 or not name.endswith("weight")]
        others = {id(p) for p in plain}
        decayed = [p for p in model.parameters() if id(p) not in others]
        groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=True)
        self.ids: list[Tensor] = []
        self.accuracy = torch.zeros(())

    def __call__(self, x: Tensor, condition: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of one update on CMX tensors x (B, C, F, T)."""
        model, train = self.model, self.config.train.var
        with torch.no_grad():
            _, _, self.ids = quantize(self.tokenizer.quantizer, encode(self.tokenizer, x))
            inputs = teacher_inputs(self.tokenizer.quantizer, self.ids)
        keep = ours.drop_path(len(model.blocks), len(x), self.config.var.drop_path, generator)
        with autocast(self.device, train.precision):
            embedded = model.embed_condition(condition)
            h = torch.cat((embedded[:, None] + model.start_position, model.embed(inputs)), dim=1)
            h = h + model.position + model.level(model.scale_of)
            for i, (block, modulation) in enumerate(zip(model.blocks, model.modulations(embedded), strict=True)):
                factors = None if keep is None else keep[i].to(self.device)
                h = var_block(cast(VARBlock, block), h, modulation, self.mask, factors)
            with torch.autocast(self.device.type, enabled=False):
                scale, shift = model.head_ada(embedded.float())[:, None].chunk(2, dim=-1)
                h = F.layer_norm(h.float(), h.shape[-1:], eps=1e-6) * (scale + 1) + shift
            logits = model.head(h).float()
        target = torch.cat(self.ids, dim=1)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        self.accuracy = (logits.detach().argmax(-1) == target).float().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class TokenizerStep:
    """The published step of the tokenizer, before its discriminator has joined."""

    def __init__(self, config: Config, model: Tokenizer, discriminator: Discriminator, ema: Tokenizer) -> None:
        self.config, self.model, self.discriminator, self.ema = config, model, discriminator, ema
        self.device = model.mask.device
        train = config.train.tokenizer
        settings = {"lr": train.lr, "betas": train.betas, "weight_decay": train.weight_decay}
        self.optimizer = torch.optim.AdamW(model.parameters(), **settings)
        self.d_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=train.discriminator_lr, betas=train.betas)
        scales, codes = len(config.tokenizer.scales), config.tokenizer.codebook_size
        self.use = torch.zeros(scales, codes, device=self.device)
        self.ids: list[Tensor] = []
        self.used: list[float] = []

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of one update on CMX tensors x (B, C, F, T)."""
        model, discriminator, train = self.model, self.discriminator, self.config.train.tokenizer
        depth, rate = self.config.tokenizer.depth, self.config.tokenizer.drop_path
        with autocast(self.device, train.precision):
            latent = encode(model, x, _to(ours.drop_path(depth, len(x), rate, generator), self.device))
            with torch.autocast(self.device.type, enabled=False):
                quantized, vq, self.ids = quantize(model.quantizer, latent)
            y = decode(model, quantized, _to(ours.drop_path(depth, len(x), rate, generator), self.device))
        self._count(len(x))
        reconstruction = F.mse_loss(y, x)
        with autocast(self.device, train.precision):
            adversarial = -discriminator(y).float().mean()
        (a,) = torch.autograd.grad(reconstruction, model.head.weight, retain_graph=True)
        (b,) = torch.autograd.grad(adversarial, model.head.weight, retain_graph=True)
        adaptive = (a.norm() / (b.norm() + 1e-4)).clamp(0, 1e4).detach()
        loss = reconstruction + vq + 0.0 * adaptive * adversarial
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.d_optimizer.zero_grad()
        with autocast(self.device, train.precision):
            real, fake = discriminator(x).float(), discriminator(y.detach()).float()
        (0.0 * 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
        self.d_optimizer.step()
        self.d_optimizer.zero_grad()
        with torch.no_grad():
            for mean, p in zip(self.ema.parameters(), model.parameters(), strict=True):
                mean.mul_(train.ema).add_(p, alpha=1 - train.ema)
        _ = loss.item(), vq.item()
        return loss.detach()

    @torch.no_grad()
    def _count(self, batch: int) -> None:
        """The share of the codes that each scale has used of late."""
        codes = self.config.tokenizer.codebook_size
        starts = self.config.tokenizer.starts
        threshold = batch * (starts[-1] - starts[-2]) / codes * 0.08
        self.used = []
        for ids, use in zip(self.ids, self.use, strict=True):
            use.mul_(0.9).add_(torch.bincount(ids.flatten(), minlength=codes), alpha=0.1)
            self.used.append((use >= threshold).float().mean().item() * 100)


def _to(keep: Tensor | None, device: torch.device) -> Tensor | None:
    return None if keep is None else keep.to(device)
