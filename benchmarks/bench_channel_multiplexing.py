"""Channel multiplexing at the paper's shapes (MARS §3.4): the trainer's step on 256 x 256 x 1 and on 128 x 128 x 4.

Both read the low 256 bins of the same 2 s with the ViT-B tokenizer and 16,384 codes: 256 patches and 256 latent tokens
against 64 and 256. The paper's training took 1.5 times as long without. `before` is a step without the discriminator
(28 % of the training), `after` is one with it. The peak is that of a step, above weights, averages and moments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.contenders import Contender, Place, race
from mars.config import preset
from mars.data import open_dataset
from mars.runtime import peak_memory, stream
from mars.train.tokenizer import TokenizerStage

SMALL = ("tokenizer.width=32", "tokenizer.depth=1", "tokenizer.heads=2", "tokenizer.codebook_size=64")


def step_of(name: str, batch: int, device: str, joined: bool, small: bool) -> Callable[[], Tensor]:
    """A training step of the preset; returns the loss."""
    config = preset(name, SMALL if small else ())
    stage = TokenizerStage(config, open_dataset(None), torch.device(device), seed=0)
    x = stage.batch(np.arange(batch))
    number = stage.train.steps - 1 if joined else 1

    def step() -> Tensor:
        loss = stage.step(number, [x], [stream(0, 1, number)])["loss"]
        assert isinstance(loss, Tensor)
        assert torch.isfinite(loss)
        return loss

    return step


@pytest.mark.benchmark(group="channel multiplexing, MARS §3.4")
@pytest.mark.parametrize("discriminator", ["before", "after"])
def bench_step(benchmark: Any, place: Place, discriminator: str) -> None:
    batch = 16 if place.device == "cuda" else 2
    names = {"128 x 128 x 4": "cmx", "256 x 256 x 1": "truncated"}
    contenders = {}
    for shape, name in names.items():
        run = step_of(name, batch, place.device, discriminator == "after", not benchmark.enabled)
        contenders[shape] = Contender(run)
        if benchmark.enabled and place.device == "cpu":
            run()  # the moments come with the first step
            contenders[shape].peak_memory = peak_memory(run, torch.device(place.device))
    race(benchmark, place, contenders, rounds=5, targets={"256 x 256 x 1": 1.5})
