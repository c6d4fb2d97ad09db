"""Compilation of the transformer blocks with torch.compile, tried out before the first step.

Blocks are compiled one by one in place (`nn.Module.compile`): all of a kind share one graph, names in the state dict
stay, and wrappers around the model see the same modules. Shapes are static: micro-batches are all of one size, and
validation runs the EMA weights, which are not compiled. As compilation is lazy, a missing compiler would show in
the middle of the first step; a dry run of that step shows it before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from mars.config import TrainConfig
from mars.errors import ConfigError

AUTO = ("cuda",)  # device types. On one core of a Xeon it took 20 s and saved 3 to 13 % of a step


class Compilable(Protocol):
    """The interface that compilation needs of a stage."""

    train: TrainConfig
    device: torch.device

    def blocks(self) -> list[nn.Module]:
        """Return the modules to compile."""

    def dry_run(self) -> None:
        """Run the forward and backward pass of a micro-batch, and leave no trace."""


def compile_blocks(stage: Compilable, say: Callable[[str], None]) -> bool:
    """Compile the blocks of `stage` if `train.compile` says so, and return whether they are compiled.

    "auto" compiles on CUDA; if that fails, `say` gets a warning and the blocks stay as they were.

    Raises:
        ConfigError: `train.compile` is "on" and compilation fails.
    """
    mode = stage.train.compile
    if mode == "off" or (mode == "auto" and stage.device.type not in AUTO):
        return False
    blocks = stage.blocks()
    for block in blocks:
        block.compile(dynamic=False)
    try:
        stage.dry_run()
    except Exception as error:
        for block in blocks:
            block._compiled_call_impl = None
        stage.dry_run()  # what fails without compilation too is not its fault, and is raised as it is
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if mode == "on":
            raise ConfigError(
                f"train.compile=on: torch.compile failed ({reason}); install what it names or use train.compile=off"
            ) from error
        say(f"warning: torch.compile failed ({reason}); training goes on without it")
        return False
    return True
