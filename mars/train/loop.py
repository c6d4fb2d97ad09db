"""The loop of both stages: draw a batch, step, log, validate, save; resume from what was saved.

Every random choice depends on (seed, step, micro-batch) alone, so a resumed run needs no saved random state, and it
does not matter which process takes which micro-batch.
"""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mars.errors import Diverged
from mars.runtime import stream
from mars.train.folder import RunFolder
from mars.train.stage import Stage

MAX_BAD_STEPS = 10  # in a row


@lru_cache(maxsize=2)  # a step may end one epoch and open the next
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return torch.randperm(count, generator=stream(seed, 0, epoch)).numpy()


def batch_indices(seed: int, step: int, batch: int, notes: np.ndarray) -> np.ndarray:
    """The notes of one step: each epoch is a new permutation, and an epoch's rest opens the next one."""
    chosen: list[np.ndarray] = []
    position, end = step * batch, (step + 1) * batch
    while position < end:
        epoch, offset = divmod(position, len(notes))
        part = _order(seed, epoch, len(notes))[offset : offset + end - position]
        chosen.append(notes[part])
        position += len(part)
    return np.concatenate(chosen)


def run(
    stage: Stage,
    folder: RunFolder,
    notes: np.ndarray,
    *,
    seed: int,
    max_steps: int | None = None,
    max_time: float | None = None,
    console: Console | None = None,
) -> int:
    """Train to the configured number of steps, or until `max_steps`, `max_time` seconds or a signal.

    SIGINT and SIGTERM finish the step and save. Returns the number of steps done, over all sittings.

    Raises:
        Diverged: ten steps in a row were not finite.
        OSError: a checkpoint could not be written.
    """
    train, console = stage.train, console or Console(stderr=True, soft_wrap=True)
    done = folder.restore(stage, console.print)
    if done:
        console.print(f"resuming at step {done:,} of {train.steps:,}")
    end = min(train.steps, max_steps) if max_steps is not None else train.steps
    batch = train.batch_size * train.accumulate
    began = last_log = time.monotonic()
    logged, finite = done, _Finite()

    def load(step: int) -> list[Any]:
        indices = batch_indices(seed, step, batch, notes)
        return [stage.batch(part) for part in np.split(indices, train.accumulate)]

    def save() -> None:
        folder.save(done, stage)
        stage.export(folder.path / "model")

    with (
        _stop_signals() as stop,
        _progress(console) as progress,
        ThreadPoolExecutor(max(train.workers, 1), initializer=torch.set_num_threads, initargs=(1,)) as loader,
    ):
        task = progress.add_task("", total=end, completed=done, info="")
        upcoming: deque[Future[list[Any]]] = deque()
        while done < end and not stop() and not (max_time and time.monotonic() - began > max_time):
            while len(upcoming) <= train.workers and done + len(upcoming) < end:
                upcoming.append(loader.submit(load, done + len(upcoming)))
            batches = upcoming.popleft().result()
            metrics = stage.step(done, batches, [stream(seed, 1, done, i) for i in range(train.accumulate)])
            done += 1
            finite.add(metrics["loss"])
            if finite.bad == MAX_BAD_STEPS:
                raise Diverged(
                    f"{finite.bad} steps in a row were not finite, the last at step {done - finite.late}; "
                    f"lower train.lr and resume from {folder.path / 'checkpoints'}"
                )
            if done % train.log_every == 0 or done == end:
                now = time.monotonic()
                values = {name: round(float(value), 6) for name, value in metrics.items()}
                rate = (done - logged) * batch / (now - last_log)
                logged, last_log = done, now
                folder.log({"step": done, **values, "notes_per_s": round(rate, 2), "time": round(time.time(), 1)})
                progress.update(task, info=f"loss {values['loss']:.4f}  {rate:.1f} notes/s")
                if not console.is_terminal:  # no bar either
                    left = (end - done) * batch / rate
                    console.print(
                        f"step {done:,}/{end:,}  loss {values['loss']:.4f}  {rate:.1f} notes/s  {left:.0f} s left"
                    )
            progress.update(task, completed=done)
            if done % train.validate_every == 0 or done == end:
                values = stage.validate()
                folder.log({"step": done, **values})
                shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float))
                console.print(f"step {done:,}  {shown}")
                last_log = time.monotonic()
            if done % train.save_every == 0 or done == end:
                save()
        if done > 0 and done % train.save_every and done != end:
            save()
            console.print(f"stopped at step {done:,} of {train.steps:,}; saved in {folder.path}")
    return done


class _Finite:
    """Counts in `bad` the steps in a row whose loss was not finite, without making a GPU wait for the host.

    What a step on a GPU gave is read one step later, when its copy to the host has long arrived.
    """

    def __init__(self) -> None:
        self.bad = self.late = 0
        self._arriving: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def add(self, loss: float | Tensor) -> None:
        """Take the next step's loss."""
        if not isinstance(loss, Tensor) or loss.device.type != "cuda":
            self._count(float(loss))
            return
        copy, event = torch.empty((), pin_memory=True), torch.cuda.Event()
        copy.copy_(loss.detach(), non_blocking=True)
        event.record()
        self._arriving.append((copy, event))
        self.late = 1
        if len(self._arriving) > self.late:
            copy, event = self._arriving.popleft()
            event.synchronize()
            self._count(float(copy))

    def _count(self, loss: float) -> None:
        self.bad = 0 if math.isfinite(loss) else self.bad + 1


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM set a flag, the second one acts as usual; gives the function that reads the flag."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: leave signals to the caller
        previous.clear()
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
