"""Steps whose loss or gradient was not finite: they change nothing, and too many in a row end the run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mars.errors import Diverged
from mars.files import write_atomically

MAX_BAD_STEPS = 10  # in a row


class BadSteps:
    """The bad steps since the last good one."""

    def __init__(self, report: Path) -> None:
        """report: where the steps and their notes are listed in the end."""
        self.report = report
        self.steps: list[dict[str, object]] = []

    def forget(self) -> None:
        """A step was good."""
        self.steps.clear()

    def add(self, step: int, metrics: Mapping[str, float | Tensor], notes: Sequence[object]) -> None:
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
