"""Monitoring of a run while it trains: its log, samples, report and TensorBoard.

No error here stops the training, except a full disk.
"""

from __future__ import annotations

import errno
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

import mars
from mars.config import TrainConfig
from mars.errors import DiskError, Diverged
from mars.runs import report, samples
from mars.runs.folder import RunFolder
from mars.runs.log import kind
from mars.runs.samples import Sampler
from mars.runs.tensorboard import Board
from mars.runtime import process_peak


class Watch:
    """Keeps the log of a run and, given a sampler, its samples, its report and (with `tensorboard`) TensorBoard.

    Every process calls it, and only the main one writes.
    """

    def __init__(
        self,
        run: RunFolder,
        train: TrainConfig,
        say: Callable[[str], None],
        sampler: Sampler | None = None,
        *,
        device: torch.device,
        tensorboard: bool = False,
    ) -> None:
        self.run, self.train, self.say, self.sampler = run, train, say, sampler
        self.device, self.main = device, run.world.main
        self.tensorboard = tensorboard and self.main
        self.board: Board | None = None
        self.step = 0
        self.news = False  # since the last report
        self.complete = False  # nothing is left to train
        self.signalled = False  # a signal has stopped the session

    @contextmanager
    def session(self, step: int) -> Iterator[None]:
        """Keep the log and TensorBoard open from `step` on, until the block ends."""
        self.step = step
        self.board = Board(self.run.path, step) if self.tensorboard else None
        try:
            self.event("started", mars=mars.__version__, torch=torch.__version__, device=_device_name(self.device))
            self._report()
            yield
            self.complete |= self.step >= self.train.steps
            if self.complete:
                self.event("finished")
            else:
                self.event("stopped", **({"by": "signal"} if self.signalled else {}))
            self._report()
        except Diverged as error:
            self.event("diverged", reason=str(error))
            self._report()
            raise
        finally:
            if self.board is not None:
                self.board.close()

    def log(self, record: Mapping[str, Any]) -> None:
        """Add a line to the log, with the time and, for training, the peak of memory in MB."""
        self.step = record["step"]
        if not self.main:
            return
        what = kind(record)
        memory = process_peak(self.device) if what == "training" else None
        added = {"time": round(time.time(), 1)} | ({} if memory is None else {"memory_mb": round(memory / 1e6)})
        record = {**record, **added}
        self.run.log(record)
        self.news |= what == "validation"
        if self.board is not None:
            self.board.log(record)

    def event(self, name: str, **details: Any) -> None:
        """Add a line for something that happened."""
        self.log({"step": self.step, "event": name, **details})

    def memory(self) -> str:
        """Return the peak of memory so far, as text."""
        peak = process_peak(self.device)
        return "" if peak is None else f"{peak / 1e9:.1f} GB"

    def samples_due(self, step: int, last: bool) -> bool:
        """Return whether `show` makes samples after this step."""
        every = self.train.sample_every
        return self.sampler is not None and every > 0 and (last or step % every == 0)

    def show(self, step: int, last: bool) -> None:
        """Write, after a step, samples if they are due, and a report if there is anything new."""
        self.step = step
        if self.sampler is not None and self.samples_due(step, last):
            with self._harmless("samples"):
                self._sample(self.sampler)
        if self.news:
            self._report()

    def _sample(self, sampler: Sampler) -> None:
        model = sampler.stage.snapshot()  # to which every process may have to contribute
        if model is None:
            return
        rate = sampler.dataset.sample_rate
        where = self.run.path / samples.FOLDER / samples.ORIGINALS
        folders = {samples.folder(self.run.path, self.step): ("sample", sampler.samples(model))}
        if not where.exists() and (originals := sampler.originals(model)):
            folders[where] = "original", originals
        for path, (title, notes) in folders.items():
            samples.write(path, notes, rate)
            if self.board is not None:
                self.board.show(title, notes, rate, self.step)
        self.event("samples")
        self.news = True

    def _report(self) -> None:
        self.news = False
        if self.main and self.sampler is not None:
            with self._harmless("report"):
                report.write(self.run.path)

    @contextmanager
    def _harmless(self, what: str) -> Iterator[None]:
        """Turn errors in the block into a warning and a line of the log, except for a full disk."""
        try:
            yield
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if full or isinstance(error, DiskError):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.say(f"warning: no {what} of step {self.step:,}, training goes on: {reason}")
            self.event("failed", what=what, reason=reason)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}), threads: {torch.get_num_threads()}"
