"""Planned against measured memory of a training step: preset `notes` on a CPU, the published model on a GPU."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch

from benchmarks.contenders import Place
from mars.config import preset
from mars.models.tokenizer import Tokenizer
from mars.runs.stage import StageName
from mars.runtime import peak_memory, stream
from mars.train.plan import DryRun, Notes
from mars.train.tokenizer import TokenizerStage
from mars.train.var import VARStage

BATCH, MICRO_BATCHES = 8, 2


@pytest.mark.benchmark(group="planned memory of a training step")
@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("stage", ["tokenizer", "var"])
def bench_memory(benchmark: Any, place: Place, stage: StageName, checkpointing: str) -> None:
    """The plan is within 15 % of `torch.cuda.max_memory_allocated`, or of what PyTorch allocates on a CPU."""
    name = "smoke" if not benchmark.enabled else "paper" if place.device == "cuda" else "notes"
    config = preset(name, (f"train.checkpointing={checkpointing}",), stage)
    device: Literal["cpu", "cuda"] = "cuda" if place.device == "cuda" else "cpu"
    planned = DryRun(config, stage, device).step(BATCH, MICRO_BATCHES)

    where, notes = torch.device(device), Notes(config.audio.samples)
    trained: TokenizerStage | VARStage
    if stage == "tokenizer":
        trained = TokenizerStage(config, notes, where, 0)
    else:
        tokens = torch.zeros(1, config.tokenizer.tokens, dtype=torch.int32)
        trained = VARStage(config, notes, Tokenizer(config).to(where), tokens, where, 0)
    batches: list[Any] = [trained.batch(np.zeros(BATCH, np.int64)) for _ in range(MICRO_BATCHES)]
    last = trained.train.steps - 1

    def step() -> None:
        trained.step(last, batches, [stream(0, 1, 0, i) for i in range(MICRO_BATCHES)])

    step()  # the moments
    measured = peak_memory(step, where)
    benchmark.extra_info |= {"planned": planned.peak - planned.held, "measured": measured}
    assert planned.peak - planned.held == pytest.approx(measured, rel=0.15)
    benchmark.pedantic(step, rounds=1)
