"""Second stage: next-scale prediction on the tokenizer's tokens (Tian et al. 2024, §3.2)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mars import checkpoint, labels
from mars.config import Config
from mars.data import Dataset
from mars.data.splits import spread
from mars.errors import CheckpointError
from mars.kernels import linear_cross_entropy, token_scores
from mars.model import Model
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR, key
from mars.runs.distributed import ALONE, World
from mars.runtime import autocast, stream, to_device
from mars.train.optimizer import Optimizer, not_finite
from mars.train.spans import span


class Objective(nn.Module):
    """The losses of training and validation as one module: DDP and FSDP2 act on all uses of the weights inside it."""

    def __init__(self, model: VAR) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, inputs: Tensor, condition: Tensor, generator: torch.Generator | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the mean cross-entropy in nats; in evaluation mode that of each token, and whether it was likeliest.

        Args:
            ids: int64 (B, L), the tokens; the results per token have this shape.
            inputs, condition, generator: as for `VAR.forward`.
        """
        head = self.model.head
        with span("forward"):
            x = self.model.hidden(inputs, condition, generator).flatten(0, 1)
        with span("loss"):
            if self.model.training:
                return linear_cross_entropy(x, head.weight, head.bias, ids.flatten())
            losses, right = token_scores(x, head.weight, head.bias, ids.flatten())
        return losses.view_as(ids), right.view_as(ids)


class VARStage:
    """Trains a `VAR` on precomputed tokens."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        tokenizer: Tokenizer,
        tokens: Tensor,
        device: torch.device,
        seed: int,
        world: World = ALONE,
        shard: bool = False,
        tokenizer_data: str | None = None,
        init: Model | None = None,
    ) -> None:
        """Make the model and its optimiser.

        Args:
            tokens: integer (notes, L) of the whole dataset, from `mars.train.tokens`.
            shard: spread the VAR over the processes.
            tokenizer_data: fingerprint of the dataset that the tokenizer was trained on; None: unknown.
            init: a model whose VAR the weights start from; its words are kept, and those of the dataset added.
        """
        self.config = config.resolved("var", len(dataset.split("train")))
        self.train = self.config.train.var
        self.dataset, self.device, self.world = dataset, device, world
        self.tokenizer, self.tokens = tokenizer, tokens
        self.data = {"var": dataset.fingerprint} | ({"tokenizer": tokenizer_data} if tokenizer_data else {})
        columns, attributes = dataset.labels(), config.var.condition
        learning = dataset.labels(dataset.split("train"))
        self.words = labels.vocabularies(attributes, learning, dataset.words)
        if init is not None:
            self.words = labels.grown(init.transformer.config.condition, init.words, self.words)
        self.conditions = labels.column_ids(columns, attributes, dataset.words, self.words)
        self.notes = labels.entries(learning, attributes, dataset.words)
        with torch.random.fork_rng():
            torch.manual_seed(stream(seed, 2).initial_seed())
            self.model = VAR(config.var, config.tokenizer, self.words).to(device)
        if init is not None:
            start_from(self.model, self.words, init.transformer, init.words)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.model.checkpointing = self.train.checkpointing
        self.objective, self.validated = Objective(self.model), Objective(self.ema)
        self.sharded = shard
        if shard:
            for objective in (self.objective, self.validated):
                self.world.shard(objective, objective.model.blocks)
        self.trained = self.objective if shard else self.world.wrap(self.objective)
        self.optimizer = Optimizer(self.model, self.train, self.ema)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (B, L), teacher-forcing inputs (B, L - n_1, D) and condition (B, attributes)."""
        ids = to_device(self.tokens[indices].long(), self.device)
        with torch.no_grad():
            inputs = self.tokenizer.quantizer.teacher_inputs(ids)
        return ids, inputs, to_device(self.conditions[indices], self.device)

    def step(
        self, step: int, batches: list[tuple[Tensor, Tensor, Tensor]], streams: list[torch.Generator]
    ) -> dict[str, float | Tensor]:
        """Do one update; the loss is the mean cross-entropy over all tokens of all scales, in nats."""
        self.trained.train()
        total = torch.zeros((), device=self.device)
        for i, ((ids, inputs, condition), generator) in enumerate(zip(batches, streams, strict=True)):
            self.world.sync(self.trained, last=i == len(batches) - 1)
            condition = self._hide(condition, generator)
            with autocast(self.device, self.train.precision):
                loss = self.trained(ids, inputs, condition, generator) / len(batches)
            with span("backward"):
                loss.backward()
            total += loss.detach()
        total = self.world.mean(total)
        with span("optimizer"):
            norm = self.optimizer.clip()
        bad = not_finite(total + norm)
        return {"loss": total.where(bad == 0, nan), "grad_norm": norm, "lr": self.optimizer.update(step, bad=bad)}

    def blocks(self) -> list[nn.Module]:
        """Return the modules to compile."""
        return list(self.model.blocks)

    def dry_run(self) -> None:
        """Run the forward and backward pass of a micro-batch, and leave no trace."""
        self.trained.train()
        ids, inputs, condition = self.batch(np.zeros(self.train.batch_size, np.int64))
        with autocast(self.device, self.train.precision):
            loss = self.trained(ids, inputs, condition, stream(0))
        loss.backward()
        self.optimizer.forget()

    def _hide(self, condition: Tensor, generator: torch.Generator) -> Tensor:
        """Replace by null the whole condition of some notes, for guidance, and single attributes of others."""
        rate = self.config.var.condition_dropout
        hidden = torch.rand(len(condition), 1, generator=generator) < rate
        hidden = hidden | (torch.rand(condition.shape, generator=generator) < rate)
        return torch.where(to_device(hidden, self.device), self.model.null_condition(len(condition)), condition)

    def report(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Return nothing: this stage gathers no metrics."""
        return {}

    @torch.inference_mode()
    def validate(self) -> dict[str, Any]:
        """Return the cross-entropy (nats per token) and accuracy of the EMA weights on held-out notes, per scale.

        Empty where no notes are held out.
        """
        notes = spread(self.dataset.split("valid"), self.train.validate_notes)
        if not len(notes):
            return {}
        loss = correct = torch.zeros(())
        for part in np.array_split(notes, -(-len(notes) // self.train.batch_size)):
            ids, inputs, condition = self.batch(part)
            with autocast(self.device, self.train.precision):
                losses, right = self.validated(ids, inputs, condition)
            loss = loss + losses.sum(0).cpu() / len(notes)
            correct = correct + right.sum(0).cpu() / len(notes)
        lengths = self.model.lengths
        return {
            "val_loss": float(loss.mean()),
            "val_accuracy": float(correct.mean()),
            "val_loss_per_scale": [round(float(part.mean()), 4) for part in loss.split(lengths)],
            "val_accuracy_per_scale": [round(float(part.mean()), 4) for part in correct.split(lengths)],
        }

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Weights, EMA weights, optimiser."""
        return {
            "model": self.model.state_dict(),
            "averaged": self.ema.state_dict(),
            "optimizer": self.optimizer.state(),
        }

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], source: Path) -> None:
        """Restore `state()`."""
        if state.keys() != {"model", "averaged", "optimizer"}:
            raise CheckpointError(f"{source} holds {sorted(state)}; it is of another stage")
        checkpoint.load_weights(self.model, state["model"], source, self.world.part)
        checkpoint.load_weights(self.ema, state["averaged"], source, self.world.part)
        self.optimizer.load_state(state["optimizer"], source)

    def snapshot(self) -> Model | None:
        """Return the model of tokenizer and EMA VAR, both as they are or, if sharded, copied to the CPU."""
        var = self._gathered_ema() if self.sharded else self.ema
        if not self.world.main:
            return None
        tokenizer = copy.deepcopy(self.tokenizer).cpu() if self.sharded else self.tokenizer  # where the VAR is
        return Model(
            config=self.config, tokenizer=tokenizer, var=var, notes=self.notes, words=self.words, data=self.data
        )

    def _gathered_ema(self) -> VAR | None:
        """Return the EMA VAR on the CPU of the main process, to which every process contributes."""
        weights = self.world.gather(self.ema.state_dict())
        if not self.world.main:
            return None
        with torch.device("meta"):
            var = VAR(self.config.var, self.config.tokenizer, self.words)
        var.load_state_dict(weights, assign=True)
        var.scale_of = self.ema.scale_of.cpu()
        return var.requires_grad_(False).eval()


@torch.no_grad()
def start_from(model: VAR, words: labels.Words, other: VAR, others: labels.Words) -> None:
    """Copy the weights of another VAR, whose conditions are among those of `model`, each with its own words.

    Words that it does not know start as the mean of those that it knows. A condition that it lacks starts as zeros, so
    that at first nothing depends on it.
    """
    state = other.state_dict()
    for name in model.config.condition:
        place = f"condition.{key(name)}.weight"
        rows = state.get(place)
        table = torch.zeros_like(model.state_dict()[place])
        if rows is not None:
            known = {value: i for i, value in enumerate(labels.label(name).classes(others))}
            mean = rows[:-1].mean(0)
            classes = labels.label(name).classes(words)
            table = torch.stack([*(rows[known[v]] if v in known else mean for v in classes), rows[-1]]).to(table)
        state[place] = table
    model.load_state_dict(state)
