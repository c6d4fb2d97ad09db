"""One step of each stage, forward and backward: preset `notes` on a CPU, the published model on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.contenders import Contender, Place, race
from mars import audio, kernels
from mars.config import Config, preset
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR
from mars.runtime import autocast


def step_of(stage: str, config: Config, batch: int, device: str) -> Callable[[], float]:
    """A step on random sounds and tokens; returns the loss."""
    tokenizer = Tokenizer(config).to(device).train()
    place = torch.device(device)
    if stage == "tokenizer":
        sounds = torch.randn(batch, config.audio.samples, device=device) / 8

        def tokenize() -> float:
            x = audio.multiplexed(sounds, config.audio)
            with autocast(place, "auto"):
                y, quantized = tokenizer(x, torch.Generator().manual_seed(0))
            loss = (y.float() - x).square().mean() + quantized.loss
            loss.backward()
            tokenizer.zero_grad()
            return loss.item()

        return tokenize
    var = VAR(config.var, config.tokenizer).to(device).train()
    ids = torch.randint(config.tokenizer.codebook_size, (batch, config.tokenizer.tokens), device=device)

    def predict() -> float:
        with torch.no_grad():
            inputs = tokenizer.quantizer.teacher_inputs(ids)
        with autocast(place, "auto"):
            logits = var(inputs, var.null_condition(batch), torch.Generator().manual_seed(0))
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
        loss.backward()
        var.zero_grad()
        return loss.item()

    return predict


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("stage", ["tokenizer", "var"])
def bench_step(benchmark: Any, place: Place, stage: str) -> None:
    torch.manual_seed(0)
    name, batch = ("paper", 8) if place.device == "cuda" else ("notes", 8)
    run = step_of(stage, preset(name if benchmark.enabled else "smoke"), batch, place.device)

    def plain() -> float:
        with kernels.use("reference"):
            return run()

    def close(loss: float, ours: float) -> None:
        assert abs(loss - ours) <= 0.01 * abs(ours)

    race(benchmark, place, {"ours": Contender(run), "plain PyTorch kernels": Contender(plain, check=close)}, rounds=5)
