"""The interface between the training loop and a stage."""

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
    """A training stage: the tokenizer's or the VAR's."""

    train: TrainConfig

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def batch(self, indices: np.ndarray) -> Any:
        """Return the inputs of one micro-batch; called on other threads (`train.workers`), ahead of the steps."""

    def step(self, step: int, batches: list[Any], streams: list[torch.Generator]) -> dict[str, float | Tensor]:
        """One optimiser update on this process's micro-batches, each with its own random stream.

        Returns the metrics to log, "loss" among them; nothing is updated if they are not finite. The loss is that of
        all processes, the other metrics are this one's.
        """

    def report(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Return the metrics gathered since the last call, for the log; warnings go to `say`."""

    def validate(self) -> dict[str, Any]:
        """Return the metrics of the EMA weights on held-out notes; empty if no notes are held out."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors needed to resume; sharded ones stay sharded."""

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], source: Path) -> None:
        """Restore `state()` from whole tensors. Raises `CheckpointError` if anything does not fit."""

    def snapshot(self) -> Model | None:
        """Return the complete model with the EMA weights on the main process, and None on the others."""
