"""What the loop asks of a training stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mars.config import TrainConfig
from mars.model import Model

StageName = Literal["tokenizer", "var"]


class Stage(Protocol):
    """What a training stage supplies."""

    train: TrainConfig

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def batch(self, indices: np.ndarray) -> Any:
        """Inputs for the notes of one micro-batch; called on other threads (`train.workers`), ahead of the steps."""

    def step(self, step: int, batches: list[Any], streams: list[torch.Generator]) -> dict[str, float | Tensor]:
        """One optimiser update on this process's micro-batches, each with its own random stream.

        Returns the metrics to log, "loss" among them; nothing is updated if they are not finite. The loss is that of
        all processes, the other metrics are this one's.
        """

    def report(self, say: Callable[[str], None]) -> dict[str, Any]:
        """What has gathered since the last call, for the log; `say` is given the warnings."""

    def validate(self) -> dict[str, Any]:
        """Metrics on held-out notes, of the EMA weights; empty where no notes are held out."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All tensors needed to go on; those that are spread over processes as such."""

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], source: Path) -> None:
        """Restore them, from whole tensors; CheckpointError if anything does not fit."""

    def snapshot(self) -> Model | None:
        """The model with the EMA weights, able to generate; None but on the main process."""
