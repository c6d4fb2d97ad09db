"""VAR: a transformer that predicts one whole scale of tokens at a time (Tian et al. 2024, arXiv:2404.02905, §3.2).

AdaLN blocks, l2-normalised attention with a learned scale per head, absolute and level embeddings. The condition is
ours: any of `mars.labels.LABELS`, each an embedding with a null row, added up; or none at all.

Letters: B batch, N scales, n_k tokens of scale k, L tokens in all, W width, V codebook size, D code dimension.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mars import labels
from mars.config import TokenizerConfig, VARConfig
from mars.kernels import ScaleCausalAttention
from mars.models.tokenizer import drop_path, recomputed
from mars.runtime import to_device

Cache = list[tuple[Tensor, Tensor]]  # per block: keys and values (B, H, L, d), filled from the front


class Block(nn.Module):
    """AdaLN block; `ada` gives the six modulations, or with shared AdaLN an offset to the shared ones."""

    def __init__(self, width: int, heads: int, shared: bool, lengths: Sequence[int]) -> None:
        super().__init__()
        self.attn = ScaleCausalAttention(width, heads, lengths)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        if shared:
            self.offset = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.shared = shared

    def modulation(self, condition: Tensor) -> Tensor:
        """Return (B, 1, 6, W): the gains of both branches, and the scales and shifts of both norms."""
        if self.shared:
            return self.offset + condition
        return self.ada(condition).view(len(condition), 1, 6, -1)

    def forward(self, x: Tensor, condition: Tensor, keep: Tensor | None) -> Tensor:
        """Return (B, L, W) of x (B, L, W); condition: as for `modulation`; keep: as in the tokenizer."""
        return self.transform(x, self.modulation(condition), keep)

    def transform(
        self,
        x: Tensor,
        modulation: Tensor,
        keep: Tensor | None,
        cache: tuple[Tensor, Tensor] | None = None,
        start: int = 0,
    ) -> Tensor:
        """Compute `forward` from a modulation that is computed already; cache, start: see `ScaleCausalAttention`."""
        gain1, gain2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        y = self.attn(_norm(x) * (scale1 + 1) + shift1, cache, start) * gain1
        x = x + (y if keep is None else y * keep[0])
        y = self.mlp(_norm(x) * (scale2 + 1) + shift2) * gain2
        return x + (y if keep is None else y * keep[1])


def _norm(x: Tensor) -> Tensor:
    """Apply a LayerNorm without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def key(name: str) -> str:
    """What the table of a condition is called in `VAR.condition`: people may call labels what parts of modules are."""
    return name if name in labels.LABELS else f"own {name}"


class VAR(nn.Module):
    """Logits of every scale's tokens given all coarser scales and the condition."""

    checkpointing = False  # in training mode: see `mars.models.tokenizer.recomputed`

    def __init__(
        self,
        config: VARConfig,
        tokenizer: TokenizerConfig,
        words: labels.Words | None = None,
        *,
        classes: Mapping[str, int] | None = None,
    ) -> None:
        """Make a transformer for the tokens of a tokenizer.

        Args:
            words: the words of each open condition; see `mars.labels.vocabularies`.
            classes: how many classes each condition has, in place of `config.condition`: for what is no sound.
        """
        super().__init__()
        self.config = config
        self.lengths = [h * w for h, w in tokenizer.scales]
        self.starts = tokenizer.starts
        width, first, tokens = config.width, self.lengths[0], tokenizer.tokens
        # The last row of each table is the null condition.
        sizes = labels.sizes(config.condition, words or {}) if classes is None else classes
        self.condition = nn.ModuleDict({key(name): nn.Embedding(size + 1, width) for name, size in sizes.items()})
        self.start = None if sizes else nn.Parameter(torch.empty(1, width))  # stands for the condition
        self.start_position = nn.Parameter(torch.empty(1, first, width))
        self.position = nn.Parameter(torch.empty(1, tokens, width))
        self.level = nn.Embedding(len(self.lengths), width)
        self.embed = nn.Linear(tokenizer.code_dim, width)
        self.shared_ada = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)) if config.shared_adaln else None
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.shared_adaln, self.lengths) for _ in range(config.depth)
        )
        self.head_ada = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, tokenizer.codebook_size)
        self.register_buffer(
            "scale_of",
            torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths), output_size=tokens),
            persistent=False,
        )
        self._initialise()

    @torch.no_grad()
    def _initialise(self, gain: float = 1e-3) -> None:
        """Initialise as VAR does: truncated normals of variance 1 / (3 W), near-zero branches and head."""
        width, std = self.config.width, (1 / (3 * self.config.width)) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for p in (self.start, self.start_position, self.position):
            if p is not None:
                nn.init.trunc_normal_(p, std=std)
        for name, p in self.named_parameters():
            if name == "head.weight":
                p.mul_(0.02)
            elif name.endswith(("attn.proj.weight", "mlp.2.weight")):
                p.div_((2 * len(self.blocks)) ** 0.5)
            elif name.endswith("offset"):  # (1, 1, 6, W): two gains, two scales, two shifts
                p[:, :, :2].mul_(gain)
                p[:, :, 2:].mul_(0.5)
            elif name == "head_ada.1.weight":
                p.mul_(0.5)
            elif name.endswith("ada.1.weight"):
                p[: 2 * width].mul_(gain)
                p[2 * width :].mul_(0.5)

    def null_condition(self, batch: int) -> Tensor:
        """Return the condition int64 (B, attributes) in which every attribute is unknown."""
        rows = [typing.cast(nn.Embedding, table).num_embeddings - 1 for table in self.condition.values()]
        return to_device(torch.tensor(rows, dtype=torch.int64), self.position.device).expand(batch, -1)

    def embed_condition(self, condition: Tensor) -> Tensor:
        """Embed class ids (B, attributes), in the order of `condition`, to (B, W); the last class is unknown."""
        if self.start is not None:
            return self.start.expand(len(condition), -1)
        tables = self.condition.values()  # in the order of config.condition, or of `classes`
        return torch.stack([table(ids) for table, ids in zip(tables, condition.unbind(1), strict=True)]).sum(0)

    def modulations(self, embedded: Tensor) -> list[Tensor]:
        """Return each block's (B, 1, 6, W); they depend on the condition alone, so generation computes them once."""
        condition = self._block_condition(embedded)
        return [typing.cast(Block, block).modulation(condition) for block in self.blocks]

    def _block_condition(self, embedded: Tensor) -> Tensor:
        """Return the input of every block's modulation: (B, W), or with shared AdaLN (B, 1, 6, W)."""
        return self.shared_ada(embedded).view(len(embedded), 1, 6, -1) if self.shared_ada is not None else embedded

    def modulate(self, x: Tensor, embedded: Tensor) -> Tensor:
        """Apply the conditional norm to the last block's output (B, n, W): the head's input, float32 (B, n, W)."""
        with torch.autocast(x.device.type, enabled=False):
            scale, shift = self.head_ada(embedded.float())[:, None].chunk(2, dim=-1)
            return _norm(x.float()) * (scale + 1) + shift

    def forward(self, inputs: Tensor, condition: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Predict the tokens of every scale from the true coarser ones (teacher forcing).

        Args:
            inputs: (B, L - n_1, D), from `Quantizer.teacher_inputs`.
            condition: int64 (B, attributes); see `embed_condition`.
            generator: CPU stream for stochastic depth (training mode only).

        Returns:
            float32 logits (B, L, V) of the tokens of every scale.
        """
        return self.head(self.hidden(inputs, condition, generator)).float()

    def hidden(self, inputs: Tensor, condition: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the head's input, float32 (B, L, W), for a loss that needs no logits; arguments as for `forward`."""
        embedded = self.embed_condition(condition)
        x = torch.cat((embedded[:, None] + self.start_position, self.embed(inputs)), dim=1)
        x = x + self.position + self.level(self.scale_of)
        keep = None
        if self.training:
            keep = drop_path(len(self.blocks), len(x), self.config.drop_path, generator)
        if keep is not None:
            keep = to_device(keep.to(x.dtype), x.device)

        shared = self._block_condition(embedded)
        for i, block in enumerate(self.blocks):
            arguments = x, shared, None if keep is None else keep[i]
            x = recomputed(block, *arguments) if self.training and self.checkpointing else block(*arguments)
        return self.modulate(x, embedded)

    def new_cache(self, batch: int, dtype: torch.dtype) -> Cache:
        """Allocate the cache: keys and values of all L tokens."""
        return [typing.cast(Block, block).attn.new_cache(batch, dtype) for block in self.blocks]

    def step(
        self, k: int, inputs: Tensor | None, embedded: Tensor, modulations: Sequence[Tensor], cache: Cache
    ) -> Tensor:
        """Return the logits (B, n_k, V) of scale k, reading the coarser scales from the cache and adding its own.

        Args:
            k: scale, from 0; call with 0, 1, 2, … in turn.
            inputs: (B, n_k, D), from `Quantizer.next_input`; None for scale 0.
            embedded, modulations: of `embed_condition` and `modulations`.
            cache: of `new_cache`.
        """
        start, end = self.starts[k], self.starts[k + 1]
        x = embedded[:, None] + self.start_position if inputs is None else self.embed(inputs)
        x = x + self.position[:, start:end] + self.level.weight[k]
        for block, modulation, filled in zip(self.blocks, modulations, cache, strict=True):
            x = typing.cast(Block, block).transform(x, modulation, None, filled, start)
        return self.head(self.modulate(x, embedded)).float()
