"""First stage: reconstruction, vector quantisation and, if switched on, PatchGAN loss (MARS §2.2, Eq. 1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mars import audio, checkpoint
from mars.config import Config, TrainConfig
from mars.data import Dataset
from mars.data.splits import spread
from mars.errors import CheckpointError
from mars.model import Model
from mars.models.discriminator import Discriminator, adaptive_weight, hinge_loss
from mars.models.tokenizer import Tokenizer
from mars.runs.distributed import ALONE, World
from mars.runtime import autocast, stream, to_device
from mars.train.codebook import CodebookTraining, usage
from mars.train.optimizer import Optimizer, not_finite
from mars.train.spans import span


class TokenizerStage:
    """Trains a `Tokenizer` on the waveforms of a dataset."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        device: torch.device,
        seed: int,
        world: World = ALONE,
        init: Tokenizer | None = None,
    ) -> None:
        """Make the model, with the weights of `init` if that is given, and its optimisers."""
        self.config = config.resolved("tokenizer", len(dataset.split("train")))
        self.train = self.config.train.tokenizer
        self.dataset, self.device, self.seed, self.world = dataset, device, seed, world
        with torch.random.fork_rng():
            torch.manual_seed(stream(seed, 2).initial_seed())
            self.model = Tokenizer(config).to(device)
            self.discriminator = Discriminator(config.audio.channels).to(device) if self.train.adversarial else None
        self.begun = init is not None  # with a codebook
        if init is not None:
            self.model.load_state_dict(init.state_dict())
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.model.encoder.checkpointing = self.model.decoder.checkpointing = self.train.checkpointing
        self.optimizer = Optimizer(self.model, self.train, self.ema)
        self.wrapped = self.world.wrap(self.model)
        if self.discriminator is not None:
            self.d_start, d_train = discriminator_schedule(self.train)
            self.d_optimizer = Optimizer(self.discriminator, d_train)
            self.d_wrapped = self.world.wrap(self.discriminator)
        per_step = self.train.notes_per_step * config.tokenizer.tokens
        self.codebook = CodebookTraining(self.model.quantizer, self.ema.quantizer, self.optimizer, per_step, world)

    def batch(self, indices: np.ndarray) -> Tensor:
        """Return the CMX tensors (B, C, F, T) of notes."""
        return audio.multiplexed(to_device(self.dataset.waveforms(indices), self.device), self.config.audio)

    def adversarial_weight(self, step: int) -> float:
        """Return the weight of the adversarial term: 0 until its start, then a linear ramp."""
        t = self.train
        if self.discriminator is None or step < self.d_start:
            return 0.0
        ramp = max(t.adversarial_ramp * t.steps, 1)
        return t.adversarial_weight * min((step - self.d_start + 1) / ramp, 1.0)

    def step(self, step: int, batches: list[Tensor], streams: list[torch.Generator]) -> dict[str, float | Tensor]:
        """Do one update of the tokenizer and, once it has joined, of the discriminator."""
        if step == 0 and self.config.tokenizer.kmeans_init and not self.begun:
            self._start_codebook()
        self.model.train()
        weight = self.adversarial_weight(step)
        sums: dict[str, Tensor] = {}
        pairs = []
        for i, (x, generator) in enumerate(zip(batches, streams, strict=True)):
            self.world.sync(self.wrapped, last=i == len(batches) - 1)
            with autocast(self.device, self.train.precision), span("forward"):
                y, quantized = self.wrapped(x, generator)
            with span("codebook"):
                part = self.world.rank * len(batches) + i, self.world.size * len(batches)
                self.codebook.gather(quantized, generator, part)
            with span("loss"):
                reconstruction = (y - x).square().mean()
                loss = reconstruction + quantized.loss
            parts = {"reconstruction": reconstruction, "vq": quantized.loss}
            if weight and self.discriminator is not None:
                self.discriminator.requires_grad_(False)  # this backward is the tokenizer's alone
                with autocast(self.device, self.train.precision), span("discriminator"):
                    adversarial = -self.discriminator(y).float().mean()
                if self.train.adaptive_weight:
                    with span("discriminator"):
                        parts["adaptive"] = adaptive_weight(reconstruction, adversarial, self.model.head.weight)
                loss = loss + weight * parts.get("adaptive", 1.0) * adversarial
                parts["adversarial"] = adversarial
                pairs.append((x, y.detach()))
            with span("backward"):
                (loss / len(batches)).backward()
            for name, value in {"loss": loss, **parts}.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value.detach() / len(batches)
        sums["loss"] = self.world.mean(sums["loss"])
        with span("optimizer"):
            sums["grad_norm"] = self.optimizer.clip()
        bad = not_finite(sums["loss"] + sums["grad_norm"])
        with span("codebook"):
            self.codebook.update(bad == 0)
        rate = self.optimizer.update(step, bad=bad)
        if pairs:
            with span("discriminator"):
                sums |= self._discriminate(step, pairs, bad)
        return {**sums, "loss": sums["loss"].where(bad == 0, nan), "lr": rate}

    def blocks(self) -> list[nn.Module]:
        """Return the modules to compile."""
        return [*self.model.encoder.blocks, *self.model.decoder.blocks]

    def dry_run(self) -> None:
        """Run the forward and backward pass of a micro-batch, and leave no trace."""
        self.wrapped.train()
        x = self.batch(np.zeros(self.train.batch_size, np.int64))
        with autocast(self.device, self.train.precision):
            y, quantized = self.wrapped(x, stream(0))
        (y.sum() + quantized.loss).backward()
        self.optimizer.forget()

    def _discriminate(self, step: int, pairs: list[tuple[Tensor, Tensor]], bad: Tensor) -> dict[str, Tensor]:
        """Do one update of the discriminator on real and reconstructed tensors, unless the tokenizer's step was bad."""
        assert self.discriminator is not None
        self.discriminator.requires_grad_(True)
        total = torch.zeros((), device=self.device)
        for i, (real, fake) in enumerate(pairs):
            self.world.sync(self.d_wrapped, last=i == len(pairs) - 1)
            with autocast(self.device, self.train.precision):
                # One call each, since BatchNorm's statistics should not tell real from fake by their mixture.
                logits = self.d_wrapped(real).float(), self.d_wrapped(fake).float()
            loss = hinge_loss(*logits) / len(pairs)
            loss.backward()
            total += loss.detach()
        total = self.world.mean(total)
        bad = torch.maximum(bad, not_finite(total + self.d_optimizer.clip()))
        self.d_optimizer.update(step - self.d_start, bad=bad)
        return {"discriminator": total}

    @torch.no_grad()
    def _start_codebook(self) -> None:
        """Initialise the codebook from the latents of some training notes."""
        notes = self.dataset.split("train")
        order = torch.randperm(len(notes), generator=stream(self.seed, 3))
        notes = notes[order[: self.config.tokenizer.kmeans_init].numpy()]
        parts = np.array_split(notes, -(-len(notes) // self.train.batch_size))
        with autocast(self.device, self.train.precision):
            mine = range(self.world.rank, len(parts), self.world.size)
            # The average still is the model itself, and is never compiled: these parts differ in length.
            latents = {i: self.ema.latent(self.batch(parts[i])) for i in mine}
        self.codebook.start(latents, len(parts), self.seed)

    def report(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Use of the codebook by the training notes; see `CodebookTraining.report`."""
        return self.codebook.report(say)

    @torch.inference_mode()
    def validate(self) -> dict[str, Any]:
        """Return errors of the EMA weights on held-out notes, and the codebook's use per scale; empty without any."""
        notes = spread(self.dataset.split("valid"), self.train.validate_notes)
        if not len(notes):
            return {}
        squared = absolute = 0.0
        ids = []
        for part in np.array_split(notes, -(-len(notes) // self.train.batch_size)):
            x = self.batch(part)
            with autocast(self.device, self.train.precision):
                y, quantized = self.ema(x)
            difference = y.clamp(-1, 1) - x
            squared += difference.square().mean().item() * len(part) / len(notes)
            absolute += difference.abs().mean().item() * len(part) / len(notes)
            ids.append(quantized.ids.cpu())
        use, perplexity = codebook_use(torch.cat(ids), self.ema.quantizer.starts, self.config.tokenizer.codebook_size)
        return {"val_mse": squared, "val_mae": absolute, "codes_used": use, "perplexity": perplexity}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Weights, EMA weights, optimisers, codebook statistics, discriminator."""
        state = {
            "model": self.model.state_dict(),
            "averaged": self.ema.state_dict(),
            "optimizer": self.optimizer.state(),
            "codebook": self.codebook.state(),
        }
        if self.discriminator is not None:
            state |= {"discriminator": self.discriminator.state_dict(), "d_optimizer": self.d_optimizer.state()}
        return state

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], source: Path) -> None:
        """Restore `state()`."""
        expected = self.state().keys()
        if state.keys() != expected:
            raise CheckpointError(f"{source} holds {sorted(state)}, this run needs {sorted(expected)}")
        checkpoint.load_weights(self.model, state["model"], source)
        checkpoint.load_weights(self.ema, state["averaged"], source)
        self.optimizer.load_state(state["optimizer"], source)
        self.codebook.load_state(state["codebook"], source)
        if self.discriminator is not None:
            checkpoint.load_weights(self.discriminator, state["discriminator"], source)
            if state["d_optimizer"]:  # empty until the discriminator has joined
                self.d_optimizer.load_state(state["d_optimizer"], source)

    def snapshot(self) -> Model | None:
        """Return the model with the EMA tokenizer, not copied, on the main process, and None on the others."""
        if not self.world.main:
            return None
        return Model(config=self.config, tokenizer=self.ema, data={"tokenizer": self.dataset.fingerprint})


def codebook_use(ids: Tensor, starts: list[int], size: int) -> tuple[list[int], list[float]]:
    """Return per scale: how many different codes the tokens (B, L) use, and the perplexity of their distribution."""
    return usage(torch.stack([torch.bincount(ids[:, a:b].flatten(), minlength=size) for a, b in pairwise(starts)]))


def discriminator_schedule(train: TrainConfig) -> tuple[int, TrainConfig]:
    """Return the step at which the discriminator joins, and its settings, whose schedule counts from there."""
    start = math.ceil(train.adversarial_start * train.steps)
    steps = max(train.steps - start, 1)
    warmup = min(train.discriminator_warmup * train.steps / steps, 1.0)
    decay = train.discriminator_weight_decay
    return start, replace(train, steps=steps, warmup=warmup, lr=train.discriminator_lr, weight_decay=decay)
