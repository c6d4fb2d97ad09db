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
    """Whether the loss of each step was finite, found out without making a GPU wait for the host.

    What a step on a GPU gave is read one step later, when its copy to the host has long arrived.
    """

    def __init__(self) -> None:
        self._arriving: deque[tuple[int, Metrics, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, metrics: Metrics) -> None:
        """Take the "loss" of a step."""
        loss, event = torch.as_tensor(metrics["loss"]).detach(), None
        if loss.device.type == "cuda":
            event = torch.cuda.Event()
            loss = torch.empty((), pin_memory=True).copy_(loss, non_blocking=True)
            event.record()
        self._arriving.append((step, metrics, loss, event))

    def known(self, wait: bool) -> Iterator[tuple[int, Metrics, bool]]:
        """Step, metrics and verdict of each step that is known and was not given before; all if it may `wait`."""
        while self._arriving and (wait or len(self._arriving) > 1 or self._arriving[0][3] is None):
            step, metrics, loss, event = self._arriving.popleft()
            if event is not None:
                event.synchronize()
            yield step, metrics, math.isfinite(float(loss))


class BadSteps:
    """The bad steps since the last good one."""

    def __init__(self, report: Path) -> None:
        """report: where the steps and their notes are listed in the end."""
        self.report = report
        self.steps: list[dict[str, object]] = []

    def forget(self) -> None:
        """A step was good."""
        self.steps.clear()

    def add(self, step: int, metrics: Metrics, notes: Sequence[object]) -> None:
        """A step was bad; `notes` are the names of its notes.

        Raises:
            Diverged: it was the tenth in a row.
        """
        shown = {name: _json_number(metrics[name]) for name in ("loss", "grad_norm") if name in metrics}
        self.steps.append({"step": step, **shown, "notes": list(notes)})
        if len(self.steps) < MAX_BAD_STEPS:
            return
        write_atomically(self.report, (json.dumps(self.steps, indent=1) + "\n").encode(), durable=True)
        raise Diverged(
            f"{MAX_BAD_STEPS} steps in a row were not finite, the last at step {step}; lower train.lr in a new run; "
            f"the notes of these steps are listed in {self.report}"
        )


def _json_number(value: float | Tensor) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)  # JSON has no infinity
