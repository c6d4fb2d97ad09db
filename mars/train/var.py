"""Second stage: next-scale prediction on the tokenizer's tokens (Tian et al. 2024, §3.2)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mars import audio, checkpoint
from mars.config import CLASSES, FAMILIES, SOURCES, VELOCITIES, Config
from mars.data import Dataset
from mars.errors import CheckpointError
from mars.model import Model
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR
from mars.runtime import autocast, stream
from mars.train.optimizer import Optimizer
from mars.train.tokenizer import held_out


class VARStage:
    """Trains a `VAR` on precomputed tokens."""

    def __init__(
        self, config: Config, dataset: Dataset, tokenizer: Tokenizer, tokens: Tensor, device: torch.device, seed: int
    ) -> None:
        """tokens: integer (notes, L) of the whole dataset, from `tokenize`."""
        self.config, self.train, self.dataset, self.device = config, config.train.var, dataset, device
        self.tokenizer, self.tokens = tokenizer, tokens
        self.conditions = condition_ids(dataset, config.var.condition)
        with torch.random.fork_rng():
            torch.manual_seed(stream(seed, 2).initial_seed())
            self.model = VAR(config.var, config.tokenizer).to(device)
        self.averaged = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.model.checkpointing = self.train.checkpointing
        self.optimizer = Optimizer(self.model, self.train, self.averaged)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, L), teacher-forcing inputs (B, L - n_1, D) and condition (B, attributes)."""
        ids = self.tokens[indices].long().to(self.device)
        with torch.no_grad():
            return ids, self.tokenizer.quantizer.teacher_inputs(ids), self.conditions[indices].to(self.device)

    def step(
        self, step: int, batches: list[tuple[Tensor, Tensor, Tensor]], streams: list[torch.Generator]
    ) -> dict[str, float | Tensor]:
        """One update; the loss is the mean cross-entropy over all tokens of all scales, in nats."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        for (ids, inputs, condition), generator in zip(batches, streams, strict=True):
            condition = self._hide(condition, generator)
            with autocast(self.device, self.train.precision):
                logits = self.model(inputs, condition, generator)
            loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten()) / len(batches)
            loss.backward()
            total += loss.detach()
        norm = self.optimizer.clip()
        if not torch.isfinite(total + norm):
            self.optimizer.forget()
            return {"loss": float("nan"), "grad_norm": norm}
        return {"loss": total, "grad_norm": norm, "lr": self.optimizer.update(step)}

    def _hide(self, condition: Tensor, generator: torch.Generator) -> Tensor:
        """Replace by null the whole condition of some notes, for guidance, and single attributes of others."""
        rate = self.config.var.condition_dropout
        hidden = torch.rand(len(condition), 1, generator=generator) < rate
        hidden = hidden | (torch.rand(condition.shape, generator=generator) < rate)
        return torch.where(hidden.to(self.device), self.model.null_condition(len(condition)), condition)

    @torch.inference_mode()
    def validate(self) -> dict[str, Any]:
        """Cross-entropy (nats per token) and accuracy of the averaged weights on held-out instruments, per scale."""
        notes = held_out(self.dataset, self.train.validate_notes)
        loss = correct = torch.zeros(())
        for part in np.array_split(notes, -(-len(notes) // self.train.batch_size)):
            ids, inputs, condition = self.batch(part)
            with autocast(self.device, self.train.precision):
                logits = self.averaged(inputs, condition)
            loss = loss + F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").sum(0).cpu() / len(notes)
            correct = correct + (logits.argmax(-1) == ids).sum(0).cpu() / len(notes)
        lengths = self.model.lengths
        return {
            "val_loss": float(loss.mean()),
            "val_accuracy": float(correct.mean()),
            "val_loss_per_scale": [round(float(part.mean()), 4) for part in loss.split(lengths)],
            "val_accuracy_per_scale": [round(float(part.mean()), 4) for part in correct.split(lengths)],
        }

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Weights, averaged weights, optimiser."""
        return {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state(),
        }

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], source: Path) -> None:
        """Restore `state()`."""
        if state.keys() != {"model", "averaged", "optimizer"}:
            raise CheckpointError(f"{source} holds {sorted(state)}; it is of another stage")
        checkpoint.load_weights(self.model, state["model"], source)
        checkpoint.load_weights(self.averaged, state["averaged"], source)
        self.optimizer.load_state(state["optimizer"], source)

    def export(self, path: Path) -> None:
        """Write tokenizer and averaged VAR as a model directory that can generate."""
        notes = ranges(self.dataset)
        Model(config=self.config, tokenizer=self.tokenizer, var=self.averaged, notes=notes).save(path)


@torch.inference_mode()
def tokenize(
    tokenizer: Tokenizer, config: Config, dataset: Dataset, device: torch.device, advance: Callable[[int], None]
) -> Tensor:
    """Tokens of every note, int32 (notes, L); `advance` is told how many notes are done. Batches of fixed size."""
    size = config.train.var.batch_size
    parts = []
    for start in range(0, len(dataset), size):
        indices = np.arange(start, min(start + size, len(dataset)))
        x = audio.multiplexed(dataset.waveforms(indices).to(device), config.audio)
        with autocast(device, config.train.var.precision):
            parts.append(tokenizer.encode(x).int().cpu())
        advance(len(indices))
    return torch.cat(parts)


def condition_ids(dataset: Dataset, attributes: tuple[str, ...]) -> Tensor:
    """int64 (notes, attributes): class of each attribute, CLASSES[name] where unknown."""
    columns = []
    for name in attributes:
        values = torch.from_numpy(dataset.column(name).astype(np.int64))
        known = values >= 0
        if name == "velocity":
            levels = torch.tensor(VELOCITIES)
            values = (values[:, None] - levels).abs().argmin(dim=1)
        columns.append(torch.where(known, values, CLASSES[name]))
    return torch.stack(columns, dim=1) if columns else torch.zeros(len(dataset), 0, dtype=torch.int64)


def ranges(dataset: Dataset) -> list[dict[str, Any]]:
    """What the training notes hold, per family and source: count, pitches from-to (5th to 95th percentile)."""
    train = dataset.split("train")
    family, source = dataset.column("family")[train], dataset.column("source")[train]
    pitch = dataset.column("pitch")[train]
    found = []
    for f, s in sorted({(int(a), int(b)) for a, b in zip(family, source, strict=True)}):
        pitches = pitch[(family == f) & (source == s) & (pitch >= 0)]
        low, high = np.percentile(pitches, (5, 95)).astype(int).tolist() if len(pitches) else (-1, -1)
        found.append(
            {
                "family": FAMILIES[f] if f >= 0 else None,
                "source": SOURCES[s] if s >= 0 else None,
                "count": int(((family == f) & (source == s)).sum()),
                "pitch": [low, high],
            }
        )
    return found
