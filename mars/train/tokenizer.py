"""First stage: reconstruction, vector quantisation and, if switched on, PatchGAN loss (MARS §2.2, Eq. 1)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mars import audio, checkpoint
from mars.config import Config
from mars.data import Dataset
from mars.errors import CheckpointError
from mars.model import Model
from mars.models.discriminator import Discriminator, adaptive_weight, hinge_loss
from mars.models.tokenizer import Tokenizer
from mars.runtime import autocast, stream
from mars.train.optimizer import Optimizer


class TokenizerStage:
    """Trains a `Tokenizer` on the waveforms of a dataset."""

    def __init__(self, config: Config, dataset: Dataset, device: torch.device, seed: int) -> None:
        self.config, self.train, self.dataset, self.device = config, config.train.tokenizer, dataset, device
        with torch.random.fork_rng():
            torch.manual_seed(stream(seed, 2).initial_seed())
            self.model = Tokenizer(config).to(device)
            self.discriminator = Discriminator(config.audio.channels).to(device) if self.train.adversarial else None
        self.averaged = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.model.encoder.checkpointing = self.model.decoder.checkpointing = self.train.checkpointing
        self.optimizer = Optimizer(self.model, self.train, self.averaged)
        if self.discriminator is not None:
            self.d_optimizer = Optimizer(self.discriminator, self.train)

    def batch(self, indices: np.ndarray) -> Tensor:
        """CMX tensors (B, C, F, T)."""
        return audio.multiplexed(self.dataset.waveforms(indices).to(self.device), self.config.audio)

    def adversarial_weight(self, step: int) -> float:
        """Weight of the adversarial term: 0 until its start, then a linear ramp."""
        t = self.train
        if self.discriminator is None or step < t.adversarial_start * t.steps:
            return 0.0
        ramp = max(t.adversarial_ramp * t.steps, 1)
        return t.adversarial_weight * min((step - t.adversarial_start * t.steps + 1) / ramp, 1.0)

    def step(self, step: int, batches: list[Tensor], streams: list[torch.Generator]) -> dict[str, float | Tensor]:
        """One update of the tokenizer and, once it has joined, of the discriminator."""
        self.model.train()
        weight = self.adversarial_weight(step)
        sums: dict[str, Tensor] = {}
        pairs = []
        for x, generator in zip(batches, streams, strict=True):
            with autocast(self.device, self.train.precision):
                y, quantized = self.model(x, generator)
            reconstruction = (y - x).square().mean()
            loss = reconstruction + quantized.loss
            parts = {"reconstruction": reconstruction, "vq": quantized.loss}
            if weight and self.discriminator is not None:
                with autocast(self.device, self.train.precision):
                    adversarial = -self.discriminator(y).float().mean()
                if self.train.adaptive_weight:
                    parts["adaptive"] = adaptive_weight(reconstruction, adversarial, self.model.head.weight)
                loss = loss + weight * parts.get("adaptive", 1.0) * adversarial
                parts["adversarial"] = adversarial
                pairs.append((x, y.detach()))
            (loss / len(batches)).backward()
            for name, value in {"loss": loss, **parts}.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value.detach() / len(batches)
        sums["grad_norm"] = self.optimizer.clip()
        if not torch.isfinite(sums["loss"] + sums["grad_norm"]):
            self.optimizer.forget()
            return {**sums, "loss": float("nan")}
        rate = self.optimizer.update(step)
        if pairs:
            sums |= self._discriminate(step, pairs)
        return {**sums, "lr": rate}

    def _discriminate(self, step: int, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """One update of the discriminator on real and reconstructed tensors."""
        assert self.discriminator is not None
        self.d_optimizer.forget()  # what the tokenizer's backward left there
        total = torch.zeros((), device=self.device)
        for real, fake in pairs:
            with autocast(self.device, self.train.precision):
                # One call each, since BatchNorm's statistics should not tell real from fake by their mixture.
                logits = self.discriminator(real).float(), self.discriminator(fake).float()
            loss = hinge_loss(*logits) / len(pairs)
            loss.backward()
            total += loss.detach()
        if torch.isfinite(total + self.d_optimizer.clip()):
            self.d_optimizer.update(step, self.train.discriminator_lr / self.train.lr)
        else:
            self.d_optimizer.forget()
        return {"discriminator": total}

    @torch.inference_mode()
    def validate(self) -> dict[str, Any]:
        """Errors of the averaged weights on held-out instruments, and the codebook's use per scale."""
        notes = held_out(self.dataset, self.train.validate_notes)
        squared = absolute = 0.0
        ids = []
        for part in np.array_split(notes, -(-len(notes) // self.train.batch_size)):
            x = self.batch(part)
            with autocast(self.device, self.train.precision):
                y, quantized = self.averaged(x)
            difference = y.clamp(-1, 1) - x
            squared += difference.square().mean().item() * len(part) / len(notes)
            absolute += difference.abs().mean().item() * len(part) / len(notes)
            ids.append(quantized.ids.cpu())
        use, perplexity = codebook_use(
            torch.cat(ids), self.averaged.quantizer.starts, self.config.tokenizer.codebook_size
        )
        return {"val_mse": squared, "val_mae": absolute, "codes_used": use, "perplexity": perplexity}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Weights, averaged weights, optimisers, discriminator."""
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state(),
        }
        if self.discriminator is not None:
            state |= {"discriminator": self.discriminator.state_dict(), "d_optimizer": self.d_optimizer.state()}
        return state

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], source: Path) -> None:
        """Restore `state()`."""
        wanted = self.state().keys()
        if state.keys() != wanted:
            raise CheckpointError(f"{source} holds {sorted(state)}, this run needs {sorted(wanted)}")
        checkpoint.load_weights(self.model, state["model"], source)
        checkpoint.load_weights(self.averaged, state["averaged"], source)
        self.optimizer.load_state(state["optimizer"], source)
        if self.discriminator is not None:
            checkpoint.load_weights(self.discriminator, state["discriminator"], source)
            if state["d_optimizer"]:  # empty until the discriminator has joined
                self.d_optimizer.load_state(state["d_optimizer"], source)

    def export(self, path: Path) -> None:
        """Write the averaged tokenizer as a model directory."""
        Model(config=self.config, tokenizer=self.averaged).save(path)


def held_out(dataset: Dataset, count: int) -> np.ndarray:
    """Up to `count` notes of held-out instruments, evenly spaced; of the training notes if none are held out."""
    notes = dataset.split("valid")  # which is the training notes where none are held out
    return notes[np.linspace(0, len(notes) - 1, min(count, len(notes))).astype(np.int64)]


def codebook_use(ids: Tensor, starts: list[int], size: int) -> tuple[list[int], list[float]]:
    """Per scale: how many different codes the tokens (B, L) use, and the perplexity of their distribution."""
    used, perplexity = [], []
    for start, end in pairwise(starts):
        counts = torch.bincount(ids[:, start:end].flatten(), minlength=size).double()
        p = counts[counts > 0] / counts.sum()
        used.append(int((counts > 0).sum()))
        perplexity.append(round(float((-(p * p.log()).sum()).exp()), 1))
    return used, perplexity
