"""One whole step of each stage, from the notes to the updated weights, beside the same step done as published.

On a CPU the models are the paper's made smaller: its 256 x 256 x 2 spectrograms, scales and 16,384 codes, with a VAR of
4 blocks and a tokenizer of 6 + 6, in two widths, since the matrix products, which both steps have in common, take more
of the time the wider the model is. Two proportions of the published sizes are kept: the encoder costs about a third of
the VAR's forward pass, and the discriminator is narrower by the factor that the tokenizer is. Stochastic depth and
quantiser dropout are off in the tokenizer: there the order of draws differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import published
from benchmarks.contenders import Contender, Place, race
from mars.config import Config, override, preset
from mars.data import Dataset, open_dataset
from mars.models.discriminator import Discriminator
from mars.models.tokenizer import Tokenizer
from mars.runs.distributed import World
from mars.train.tokenizer import TokenizerStage
from mars.train.tokens import tokenize
from mars.train.var import VARStage

WIDTHS = {  # of the VAR on a CPU
    128: ("var.width=128", "var.heads=2", "tokenizer.width=96", "tokenizer.heads=3"),
    256: ("var.width=256", "var.heads=4", "tokenizer.width=192", "tokenizer.heads=3"),
}
SMALLER = (
    *("tokenizer.depth=6", "var.depth=4", "var.drop_path=0.017"),
    *("train.tokenizer.batch_size=4", "train.var.batch_size=4"),
)
SAME = (
    "tokenizer.drop_path=0",
    "tokenizer.quantizer_dropout=0",
    "train.var.accumulate=1",
    "train.tokenizer.accumulate=1",
)
Step = Callable[[], float]  # gives the loss


def settings(place: Place, precision: str, width: int, enabled: bool) -> Config:
    """The paper's on a GPU, smaller on a CPU, and tiny where only the results are compared."""
    chosen = [*SAME, f"train.tokenizer.precision={precision}", f"train.var.precision={precision}"]
    if not enabled:
        few = ("train.tokenizer.batch_size=2", "train.var.batch_size=2", "train.tokenizer.adversarial=true")
        return override(preset("smoke"), [*chosen, *few, "audio.cmx=4,2", "tokenizer.patch=16,16"])
    return override(preset("paper"), chosen if place.device == "cuda" else [*chosen, *SMALLER, *WIDTHS[width]])


def var_steps(config: Config, data: Dataset, device: torch.device) -> tuple[Step, Step]:
    """Our step of the VAR, on tokens made before, and the published one, which makes them."""
    tokenizer = Tokenizer(config).to(device).eval().requires_grad_(False)
    notes = np.arange(config.train.var.batch_size)
    exact = override(config, ["train.var.precision=float32"])
    tokens = tokenize(tokenizer, exact, data, World(device=device), lambda n: None)
    stage = VARStage(config, data, tokenizer, tokens, device, seed=0)
    other = published.VARStep(config, tokenizer, copy.deepcopy(stage.model))

    def ours() -> float:
        return float(stage.step(0, [stage.batch(notes)], [torch.Generator().manual_seed(0)])["loss"])

    def theirs() -> float:
        generator = torch.Generator().manual_seed(0)
        condition = stage._hide(stage.conditions[notes].to(device), generator)
        x = published.spectrogram(data.waveforms(notes).to(device), config.audio)
        return float(other(x, condition, generator))

    theirs()
    same = torch.cat(other.ids, dim=1).cpu() == tokens[notes].long()
    assert same.double().mean() > 0.99  # rounding may turn a near-tie
    other = published.VARStep(config, tokenizer, copy.deepcopy(stage.model))
    return ours, theirs


def tokenizer_steps(config: Config, data: Dataset, device: torch.device) -> tuple[Step, Step]:
    """Our step of the tokenizer and the published one, before the discriminator has joined."""
    stage = TokenizerStage(config, data, device, seed=0)
    notes = np.arange(config.train.tokenizer.batch_size)
    width = max(64 * config.tokenizer.width // 768, 4)
    model, ema, twin = (copy.deepcopy(m) for m in (stage.model, stage.ema, stage.ema))
    other = published.TokenizerStep(config, model, Discriminator(config.audio.channels, width).to(device), ema)

    def ours() -> float:
        return float(stage.step(0, [stage.batch(notes)], [torch.Generator().manual_seed(0)])["loss"])

    def theirs() -> float:
        x = published.spectrogram(data.waveforms(notes).to(device), config.audio)
        return float(other(x, torch.Generator().manual_seed(0)))

    x = stage.batch(notes)
    with torch.no_grad():
        ids = torch.cat(published.quantize(twin.quantizer, published.encode(twin, x))[2], dim=1)
        assert (ids == twin.encode(x)).double().mean() > 0.99
    return ours, theirs


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("stage", ["tokenizer", "var"])
def bench_step(benchmark: Any, place: Place, stage: str, width: int, precision: str) -> None:
    if width != min(WIDTHS) and (place.device == "cuda" or not benchmark.enabled):
        pytest.skip("the widths are for a CPU, to be timed")
    config = settings(place, precision, width, benchmark.enabled)
    whole, size = open_dataset(None), getattr(config.train, stage).batch_size
    data = Dataset(
        whole.audio[:size], whole.metadata[:size], whole.names[:size], whole.instruments, whole.sample_rate, "", {}
    )
    make = var_steps if stage == "var" else tokenizer_steps
    ours, theirs = make(config, data, torch.device(place.device))

    def close(loss: float, ours: float) -> None:
        assert abs(loss - ours) <= (1e-3 if precision == "float32" else 1e-2) * abs(ours)

    contenders = {"ours": Contender(ours), "as published": Contender(theirs, check=close)}
    targets = {"as published": 2.0, "memory": 0.5} if stage == "var" else {"as published": 1.5, "memory": 1.0}
    if width != min(WIDTHS):
        targets = {}
    race(benchmark, place, contenders, targets=targets, memory=True)
