"""The training loop of both stages: draw a batch, step, log, validate, save; and resume from a checkpoint.

Every random choice depends on (seed, step, micro-batch) alone, so a resumed run needs no saved random state, and it
does not matter which process takes which micro-batch, nor how many there are (`world`). Every process runs this loop
and the same validation; the main one alone writes.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any

import numpy as np
import torch
from rich.console import Console

from mars import terminal
from mars.errors import CheckpointError
from mars.runs.folder import RunFolder, checkpoint_size
from mars.runs.stage import Stage
from mars.runs.watch import Watch
from mars.runtime import stream, thread_pool
from mars.train.deadline import Deadline
from mars.train.divergence import BadSteps, Verdicts

SAVE_RATE = 1e8  # bytes per second that a disk is trusted with until the first save has been timed
STOP_SIGNALS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, n))


@lru_cache(maxsize=2)  # a step may end one epoch and open the next
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return torch.randperm(count, generator=stream(seed, 0, epoch)).numpy()


def batch_indices(seed: int, step: int, batch: int, notes: np.ndarray) -> np.ndarray:
    """Return the notes of one step, by index: each epoch is a permutation, and an epoch's rest opens the next one."""
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
    names: Sequence[str] | None = None,
    watch: Watch | None = None,
) -> int:
    """Train to the configured number of steps, or until `max_steps`, a signal, or as long as `max_time` seconds allow.

    With `train.patience` it ends, complete, where validation has got no better for so long.

    After SIGTERM, SIGINT or SIGUSR1 in any process the step is finished and saved; `max_time` leaves time for that.
    `names` are the notes' names, for `diverged.json`. Without a `watch` the run has a log but shows nothing else of
    itself. Returns the number of steps done, over all sessions.

    Raises:
        Diverged: ten steps in a row, or the weights to be saved, were not finite.
        CheckpointError: the run cannot go on from its checkpoints, or they are not the same to every process.
        DiskError: a checkpoint or the log could not be written.
    """
    world = folder.world
    train, console = stage.train, console or terminal.LogConsole()
    watch = watch or Watch(folder, train, console.print, device=torch.device("cpu"))
    deadline = Deadline(max_time, {} if max_time is None else {"save": checkpoint_size(stage) / SAVE_RATE})
    mine = world.share(train.accumulate)
    position = folder.restore(stage, console.print)
    done = saved = position.step
    if world.broadcast(done) != done:
        raise CheckpointError(f"found another newest checkpoint in {folder.path} than process 0")
    folder.rewind(done)
    if done:
        console.print(f"resuming at step {done:,} of {train.steps:,}")
    end = min(train.steps, max_steps) if max_steps is not None else train.steps
    batch = train.notes_per_step
    last_log = time.monotonic()
    logged, bad, verdicts = done, BadSteps(folder.path / "diverged.json", world.main), Verdicts()

    def load(step: int) -> list[Any]:
        indices = batch_indices(seed, step, batch, notes)
        parts = np.split(indices, train.accumulate)
        return [stage.batch(parts[i]) for i in mine]

    def take_verdicts(wait: bool) -> None:
        for step, metrics, finite in verdicts.known(wait):
            if finite:
                bad.forget()
            else:
                position.skipped += 1
                indices = batch_indices(seed, step - 1, batch, notes).tolist()
                bad.add(step, metrics, [names[i] for i in indices] if names else indices)

    def save() -> None:
        nonlocal saved
        take_verdicts(wait=True)
        with deadline.timed("save"):
            folder.save(position, stage)
        saved = done

    def validates(step: int) -> bool:
        return step % train.validate_every == 0 or step == end

    def spent() -> bool:
        """Whether the held-out notes have got no better for as long as `train.patience` allows."""
        best = position.best
        return best is not None and 0 < train.patience <= (done - best.step) // train.validate_every

    def in_time() -> bool:
        parts = {"validation": validates(done + 1), "samples": watch.samples_due(done + 1, done + 1 == end)}
        return deadline.leaves_time_for("step", "save", *(part for part, due in parts.items() if due))

    with (
        _stop_signals() as stop,
        watch.session(done),
        terminal.progress(console) as tell,
        thread_pool(max(train.workers, 1)) as loader,
    ):
        if done == 0 and train.patience:  # what the start is worth, in case nothing gets better
            with deadline.timed("validation"):
                values = world.broadcast(stage.validate())
            if values:
                position.improves(values)
                watch.log({"step": 0, **values})
                console.print("step 0  " + _shown(values))
                save()
        info = ""
        upcoming: deque[Future[list[Any]]] = deque()
        while done < end and not spent() and not world.any(stop() or not in_time()):
            while len(upcoming) <= train.workers and done + len(upcoming) < end:
                upcoming.append(loader.submit(load, done + len(upcoming)))
            with deadline.timed("step"):
                batches = upcoming.popleft().result()
                metrics = stage.step(done, batches, [stream(seed, 1, done, i) for i in mine])
                done += 1
                position.step = done
                verdicts.add(done, metrics)
                take_verdicts(wait=False)
            if done % train.log_every == 0 or done == end:
                take_verdicts(wait=True)
                now = time.monotonic()
                values = {name: round(float(value), 6) for name, value in world.means(metrics).items()}
                rate = (done - logged) * batch / (now - last_log)
                logged, last_log = done, now
                if done % train.log_every == 0 or done == train.steps:  # or a stop would show in what is saved
                    values |= stage.report(console.print)
                epoch = round(done * batch / len(notes), 3)
                counts = {"skipped": position.skipped, "notes_per_s": round(rate, 2), "epoch": epoch}
                watch.log({"step": done, **values, **counts})
                shown, memory = f"loss {values['loss']:.4f}  {rate:.1f} notes/s", watch.memory()
                info = f"{shown}  {memory}"
                if not console.is_terminal:  # no bar either
                    left = min((end - done) * batch / rate, deadline.left)
                    console.print(f"step {done:,}/{end:,}  {shown}  {left:.0f} s left  {memory}")
            tell("step", done, end, info)
            pause, improved = time.monotonic(), False
            if validates(done):
                with deadline.timed("validation"):
                    values = world.broadcast(stage.validate())  # GPUs may differ in the last bit
                if values:  # there may be no notes to validate with
                    # One that only this session's end made would make the best depend on where the run was stopped.
                    improved = (done % train.validate_every == 0 or done == train.steps) and position.improves(values)
                    watch.log({"step": done, **values})
                    console.print(f"step {done:,}  {_shown(values)}")
            if done % train.save_every == 0 or done == end or improved:
                save()
            with deadline.timed("samples"):
                watch.show(done, done == end)
            last_log += time.monotonic() - pause
        if done != saved:
            save()
        watch.signalled, watch.complete = stop(), spent()
        if spent() and position.best is not None:
            console.print(f"ended at step {done:,}: the held-out notes have been best at step {position.best.step:,}")
        elif done < train.steps:
            where = f"; saved in {folder.path}" if done else ""
            ahead = f"start the same again with `out` {folder.path} to go on"
            console.print(f"stopped at step {done:,} of {train.steps:,}{where}; {ahead}")
    world.barrier()  # a launcher may kill the main process, still saving, once another has ended
    return done


def _shown(values: Mapping[str, Any]) -> str:
    """The numbers of a validation, in words."""
    return "  ".join(f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float))


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Let a stop signal set a flag, and the same one again act as usual; yields the function that reads the flag."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    try:
        for number in STOP_SIGNALS:
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: leave signals to the caller
        previous.clear()
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
