"""Writes the log and the samples for TensorBoard to `tensorboard/` in the run folder; needs the package tensorboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mars.errors import needed
from mars.runs.log import kind
from mars.runs.samples import Sample

FOLDER = "tensorboard"
NOT_CURVES = ("step", "time", "epoch", "collapsed")


class Board:
    """Writes scalars, sounds and pictures; what an earlier session wrote of steps after `step` is taken back."""

    def __init__(self, run: Path, step: int) -> None:
        check_installed()
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(str(run / FOLDER), purge_step=step + 1)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write a line of the log; a list gives a curve per scale."""
        where = kind(record)
        for name, value in record.items():
            values = {f"/{i}": v for i, v in enumerate(value, 1)} if isinstance(value, list) else {"": value}
            for suffix, number in values.items():
                if name not in NOT_CURVES and isinstance(number, (int, float)):
                    self.writer.add_scalar(f"{where}/{name}{suffix}", number, record["step"])

    def show(self, title: str, samples: Sequence[Sample], sample_rate: int, step: int) -> None:
        """Write sounds and pictures; the title groups them, and their index names them."""
        for index, sample in enumerate(samples):
            self.writer.add_audio(f"{title}/{index}", sample.waveform, step, sample_rate)
            self.writer.add_image(f"{title}/{index}", sample.picture, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        """Write what is buffered, and close the files."""
        self.writer.close()


def check_installed() -> None:
    """Raise `MissingPackage` if the package is missing."""
    with needed("TensorBoard", "tensorboard"):
        import tensorboard  # noqa: F401
