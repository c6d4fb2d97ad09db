"""What the distributed tests run; `python -m tests.train.processes FOLDER` is one of the processes that do it together.

All runs are of `mars.train.start` on the built-in notes, cut to a quarter of a second.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from mars.models.discriminator import Discriminator
from mars.runs.distributed import World, leave, teardown
from mars.train import start, tokenizer
from mars.train.tokenizer import TokenizerStage
from mars.train.var import VARStage

SMALL = (
    *("audio.n_fft=128", "audio.hop=64", "audio.bins=64", "audio.frames=64", "audio.samples=4000", "audio.cmx=2,1"),
    *("tokenizer.patch=8,8", "tokenizer.width=16", "tokenizer.codebook_size=32", "tokenizer.code_dim=4"),
    *("tokenizer.quantizer_dropout=0.5", "tokenizer.drop_path=0.2"),
)
TRAIN = (
    *("train.steps=6", "train.batch_size=4", "train.accumulate=4", "train.precision=float32", "train.optimizer=adamw"),
    *("train.log_every=1", "train.validate_every=3", "train.validate_notes=3", "train.save_every=3"),
)
SETTINGS = {
    "tokenizer": (*SMALL, *TRAIN),
    "adversarial": (*SMALL, *TRAIN, "audio.cmx=1,2", "train.adversarial=true", "train.adversarial_start=0.3"),
    "var": (*TRAIN, "var.width=16", "var.drop_path=0.2"),
    "muon": (*TRAIN, "var.width=16", "var.shared_adaln=false", "train.optimizer=muon"),
}


def train(name: str, out: Path, **options: Any) -> None:
    """The run `name`; the second stage learns from the tokenizer that one process trained, in `one/` beside `out`."""
    options |= {"device": "cpu", "preset": "smoke", "overrides": SETTINGS[name], "out": out}
    if name in ("var", "muon"):
        start.train("var", tokenizer=out.parents[1] / "one" / "tokenizer", **options)
    else:
        start.train("tokenizer", **options)


def prepare(loaded: list[list[int]]) -> None:
    """Take a small discriminator, and add to `loaded` the notes of every micro-batch that this process loads."""
    tokenizer.Discriminator = functools.partial(Discriminator, width=4)  # type: ignore[misc, assignment]

    def batch(self: Any, indices: Any, original: Any) -> Any:
        if len(indices) == self.train.batch_size:  # not in validation
            loaded.append(indices.tolist())
        return original(self, indices)

    for kind in (TokenizerStage, VARStage):
        kind.batch = functools.partialmethod(batch, original=kind.batch)  # type: ignore[method-assign, assignment]


def record_sizes() -> list[tuple[int, int]]:
    """A list that gets, for every group of tensors put together from now on, how many numbers are held and in all."""
    held: list[tuple[int, int]] = []
    original = World.gather

    def gather(self: World, tensors: Any) -> dict[str, torch.Tensor]:
        local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors.values())
        held.append((sum(t.numel() for t in local), sum(t.numel() for t in tensors.values())))
        return original(self, tensors)

    World.gather = gather  # type: ignore[method-assign, assignment]
    return held


def corrupt(rank: int, call: int) -> None:
    """Let one process get a micro-batch that is not finite, in every run of a VAR from now on."""
    original, calls = VARStage.batch, Counter[int]()

    def batch(self: VARStage, indices: Any) -> Any:
        ids, inputs, condition = original(self, indices)
        calls[id(self)] += 1
        corrupted = self.world.rank == rank and calls[id(self)] == call
        return ids, inputs * float("nan") if corrupted else inputs, condition

    VARStage.batch = batch  # type: ignore[method-assign, assignment]


def main(folder: Path) -> None:
    """All runs from their beginning; then the second third of what one process began in `moved/`."""
    torch.set_num_threads(1)
    loaded: list[list[int]] = []
    prepare(loaded)
    with teardown():
        for name in SETTINGS:
            train(name, folder / "two" / name)
        held = record_sizes()
        for name in ("var", "muon"):
            train(name, folder / "sharded" / name, shard=True)
        (folder / f"held-{os.environ['RANK']}.json").write_text(json.dumps(held), encoding="utf-8")
        for session in (3, None):
            train("adversarial", folder / "parts" / "adversarial", max_steps=session)
            train("var", folder / "parts" / "var", max_steps=session, shard=True)
        loaded.clear()
        train("tokenizer", folder / "moved" / "tokenizer", max_steps=4)
        train("var", folder / "moved" / "var", max_steps=4, shard=True)
        corrupt(rank=1, call=3)
        for how in ("corrupted", "corrupted-sharded"):
            train("var", folder / how / "var", shard=how.endswith("sharded"))
    (folder / f"loaded-{os.environ['RANK']}.json").write_text(json.dumps(loaded), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
