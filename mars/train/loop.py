"""The loop of both stages: draw a batch, step, log, validate, save; resume from what was saved.

Every random choice depends on (seed, step, micro-batch) alone, so a resumed run needs no saved random state, and it
does not matter which process takes which micro-batch.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mars.errors import Diverged
from mars.runtime import stream
from mars.train.folder import RunFolder
from mars.train.stage import Stage
from mars.train.watch import Watch

MAX_BAD_STEPS = 10  # in a row


def batch_indices(seed: int, step: int, batch: int, notes: np.ndarray) -> np.ndarray:
    """The notes of one step: each epoch is a new permutation, and an epoch's rest opens the next one."""
    chosen: list[np.ndarray] = []
    position, end = step * batch, (step + 1) * batch
    while position < end:
        epoch, offset = divmod(position, len(notes))
        order = torch.randperm(len(notes), generator=stream(seed, 0, epoch)).numpy()
        part = order[offset : offset + end - position]
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
    watch: Watch | None = None,
) -> int:
    """Train to the configured number of steps, or until `max_steps`, `max_time` seconds or a signal.

    SIGINT and SIGTERM finish the step and save. Returns the number of steps done, over all sittings. Without a `watch`
    the run has a log but shows nothing else of itself.

    Raises:
        Diverged: ten steps in a row were not finite.
        OSError: a checkpoint could not be written.
    """
    train, console = stage.train, console or Console(stderr=True, soft_wrap=True)
    watch = watch or Watch(folder, train, console.print, device=torch.device("cpu"))
    done = folder.restore(stage, console.print)
    if done:
        console.print(f"resuming at step {done:,} of {train.steps:,}")
    end = min(train.steps, max_steps) if max_steps is not None else train.steps
    batch = train.batch_size * train.accumulate
    began = last_log = time.monotonic()
    logged, bad = done, 0

    def load(step: int) -> list[Any]:
        indices = batch_indices(seed, step, batch, notes)
        return [stage.batch(part) for part in np.split(indices, train.accumulate)]

    def save() -> None:
        folder.save(done, stage)
        stage.export(folder.path / "model")

    with (
        _stop_signals() as stop,
        watch.sitting(done),
        _progress(console) as progress,
        ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as loader,
    ):
        task = progress.add_task("", total=end, completed=done, info="")
        upcoming = loader.submit(load, done) if done < end else None
        while done < end and not stop() and not (max_time and time.monotonic() - began > max_time):
            assert upcoming is not None
            batches = upcoming.result()
            upcoming = loader.submit(load, done + 1) if done + 1 < end else None
            metrics = stage.step(done, batches, [stream(seed, 1, done, i) for i in range(train.accumulate)])
            done += 1
            bad = 0 if math.isfinite(float(metrics["loss"])) else bad + 1
            if bad == MAX_BAD_STEPS:
                raise Diverged(
                    f"{bad} steps in a row were not finite, the last at step {done}; "
                    f"lower train.lr and resume from {folder.path / 'checkpoints'}"
                )
            if done % train.log_every == 0 or done == end:
                now = time.monotonic()
                values = {name: round(float(value), 6) for name, value in metrics.items()}
                rate = (done - logged) * batch / (now - last_log)
                logged, last_log = done, now
                epoch = round(done * batch / len(notes), 3)
                watch.log({"step": done, **values, "notes_per_s": round(rate, 2), "epoch": epoch})
                progress.update(task, info=f"loss {values['loss']:.4f}  {rate:.1f} notes/s  {watch.memory()}")
                if not console.is_terminal:  # no bar either
                    left = (end - done) * batch / rate
                    console.print(
                        f"step {done:,}/{end:,}  loss {values['loss']:.4f}  {rate:.1f} notes/s  {left:.0f} s left"
                        f"  {watch.memory()}"
                    )
            progress.update(task, completed=done)
            pause = time.monotonic()
            if done % train.validate_every == 0 or done == end:
                values = stage.validate()
                watch.log({"step": done, **values})
                shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float))
                console.print(f"step {done:,}  {shown}")
            if done % train.save_every == 0 or done == end:
                save()
            watch.show(done, done == end)
            last_log += time.monotonic() - pause
        if done > 0 and done % train.save_every and done != end:
            save()
            console.print(f"stopped at step {done:,} of {train.steps:,}; saved in {folder.path}")
    return done


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
