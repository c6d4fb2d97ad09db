"""Tokens from a VAR, scale by scale.

Sampling is VAR's (Tian et al. 2024, arXiv:2404.02905): guidance that grows with the scale, top-k, then top-p.

Letters: B notes, L tokens over all scales, n tokens of one scale, V codebook size, D code dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mars.errors import CheckpointError
from mars.models.quantizer import Quantizer
from mars.models.var import VAR
from mars.runtime import Precision, autocast

TILE = 8  # notes the network runs on at once on a CPU; changing it changes the bytes of all notes
TILE_ACCELERATOR = 32
# Parameters of a transformer whose tiles share the processor, each on one thread. Threads that share a tile wait for
# each other at every product: beside another busy process for most of the time. With a larger one a tile takes so long
# that few notes should have all threads. Not by the number of notes, as threads may round differently.
MOST_ON_ONE_THREAD = 50_000_000


def tile_size(device: torch.device) -> int:
    """Return how many notes the network runs on at once."""
    return TILE if device.type == "cpu" else TILE_ACCELERATOR


def workers(var: VAR, device: torch.device) -> int:
    """Tiles to be computed side by side, each on a thread of its own; 1: one after the other, on all threads."""
    small = sum(p.numel() for p in var.parameters()) <= MOST_ON_ONE_THREAD
    return torch.get_num_threads() if device.type == "cpu" and small else 1


def sample(
    var: VAR,
    quantizer: Quantizer,
    condition: Tensor,
    uniforms: Tensor,
    *,
    cfg: float,
    top_k: int,
    top_p: float,
    precision: Precision,
    temperature: float = 1.0,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw all tokens, scale after scale.

    Args:
        condition: int64 (B, attributes), see `VAR.embed_condition`.
        uniforms: (B, L) in [0, 1), one for each token to draw.
        cfg: guidance towards the condition on the last scale, growing linearly from 0 on the first. 0: none, at half
            the cost. Without effect if the transformer has no condition.
        top_k, top_p: draw among the top_k likeliest tokens, and of these among the likeliest of mass top_p.
        precision: of the transformer, see `mars.runtime.autocast`.
        temperature: that the logits are divided by, before top_k and top_p.
        first: int64 (B, n), the tokens of the first scales, which are taken as they are; None: all are drawn.

    Returns:
        ids: int64 (B, L).
        latent: (B, D, H, W), the tokens' latent map.
    """
    device = condition.device
    given = 0 if first is None else first.shape[1]
    if first is not None and given == var.starts[-1]:
        return first, quantizer.latent(first)
    cast = autocast(device, precision)
    last = len(var.lengths) - 1
    guided = cfg > 0 and len(var.condition) > 0 and last > 0
    if guided:  # the second half of the rows has the condition hidden
        condition = torch.cat((condition, var.null_condition(len(condition))))
    with cast:
        embedded = var.embed_condition(condition)
        modulations = var.modulations(embedded)
        half = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if half else torch.float32
    cache = var.new_cache(len(condition), dtype)
    ids: list[Tensor] = []
    total = inputs = None
    for k, uniform in enumerate(uniforms.split(var.lengths, dim=1)):
        with cast:
            logits = var.step(k, inputs, embedded, modulations, cache)
        if guided:
            logits, free = logits.chunk(2)
            if k > 0:  # no guidance on the first scale, but the rest needs both halves of its cache
                t = cfg * k / last
                logits = (1 + t) * logits - t * free
        if first is not None and var.starts[k] < given:
            ids.append(first[:, var.starts[k] : var.starts[k + 1]])
        else:
            ids.append(draw(logits / temperature, uniform, top_k, top_p))
        total = quantizer.add_scale(k, ids[-1], total)  # not autocast, as in training
        if k < last:
            inputs = quantizer.next_input(k + 1, total)
            inputs = torch.cat((inputs, inputs)) if guided else inputs
    assert total is not None
    return torch.cat(ids, dim=1), total


def draw(logits: Tensor, uniforms: Tensor, top_k: int, top_p: float) -> Tensor:
    """Draw tokens int64 (B, n) from logits (B, n, V), inverting the distribution at uniforms (B, n) in [0, 1).

    Kept are the top_k likeliest tokens and, with these adding up to 1, the fewest of them that reach top_p.

    Raises:
        CheckpointError: logits are not finite.
    """
    values, tokens = logits.topk(min(top_k, logits.shape[-1]), dim=-1)  # likeliest first
    mass = values.softmax(dim=-1).cumsum(dim=-1)
    if not bool(mass[..., -1].isfinite().all()):
        raise CheckpointError("the transformer's output is not finite; the model's weights are unusable")
    last = (mass[..., :-1] < top_p).sum(dim=-1, keepdim=True)  # the last token kept, at least the first
    level = uniforms[..., None] * mass.gather(-1, last)
    choice = torch.searchsorted(mass, level, right=True).minimum(last)  # level may round up to the whole mass
    return tokens.gather(-1, choice).squeeze(-1)
