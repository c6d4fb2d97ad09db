"""Steps whose loss or gradient was not finite: they change nothing, and too many in a row end the run."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mars.errors import Diverged
from mars.files import write_atomically

MAX_BAD_STEPS = 10  # in a row


Metrics = Mapping[str, float | Tensor]


class Verdicts:
    """Checks that the loss of each step is finite, without making a GPU wait for the host.

    The result of a step on a GPU is read one step later, when its copy to the host has arrived.
    """

    def __init__(self) -> None:
        self._arriving: deque[tuple[int, Metrics, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, metrics: Metrics) -> None:
        """Add the metrics of a step, whose "loss" is checked."""
        loss, event = torch.as_tensor(metrics["loss"]).detach(), None
        if loss.device.type == "cuda":
            event = torch.cuda.Event()
            loss = torch.empty((), pin_memory=True).copy_(loss, non_blocking=True)
            event.record()
        self._arriving.append((step, metrics, loss, event))

    def known(self, wait: bool) -> Iterator[tuple[int, Metrics, bool]]:
        """Yield step, metrics and whether it was finite for each step newly known; for all if it may `wait`."""
        while self._arriving and (wait or len(self._arriving) > 1 or self._arriving[0][3] is None):
            step, metrics, loss, event = self._arriving.popleft()
            if event is not None:
                event.synchronize()
            yield step, metrics, math.isfinite(float(loss))


class BadSteps:
    """The bad steps since the last good one."""

    def __init__(self, report: Path, writes: bool = True) -> None:
        """report: where the steps and their notes are listed in the end, by the process that `writes`."""
        self.report, self.writes = report, writes
        self.steps: list[dict[str, object]] = []

    def forget(self) -> None:
        """Forget the bad steps: a step was good."""
        self.steps.clear()

    def add(self, step: int, metrics: Metrics, notes: Sequence[object]) -> None:
        """Record a bad step; `notes` are the names of its notes.

        Raises:
            Diverged: it was the tenth in a row.
        """
        shown = {name: _json_number(metrics[name]) for name in ("loss", "grad_norm") if name in metrics}
        self.steps.append({"step": step, **shown, "notes": list(notes)})
        if len(self.steps) < MAX_BAD_STEPS:
            return
        if self.writes:
            write_atomically(self.report, (json.dumps(self.steps, indent=1) + "\n").encode(), durable=True)
        raise Diverged(
            f"{MAX_BAD_STEPS} steps in a row were not finite, the last at step {step}; lower train.lr in a new run; "
            f"the notes of these steps are listed in {self.report}"
        )


def _json_number(value: float | Tensor) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)  # JSON has no infinity
