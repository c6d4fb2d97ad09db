"""The loop of both stages: draw a batch, step, log, validate, save; resume from what was saved.

Every random choice depends on (seed, step) alone, so a resumed run needs no saved random state.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from mars import checkpoint
from mars.config import TrainConfig
from mars.errors import CheckpointError, Diverged
from mars.runtime import stream

KEEP = 3  # checkpoints kept per run
MAX_BAD_STEPS = 10  # in a row


class Stage(Protocol):
    """What a training stage supplies."""

    train: TrainConfig

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def batch(self, indices: np.ndarray) -> Any:
        """Inputs for these notes; called on a second thread, one batch ahead."""

    def step(self, step: int, batches: list[Any], generator: torch.Generator) -> dict[str, float | Tensor]:
        """One optimiser update; the metrics to log, "loss" among them. Nothing is updated if they are not finite."""

    def validate(self) -> dict[str, Any]:
        """Metrics on held-out notes, of the averaged weights."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All tensors needed to go on."""

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], source: Path) -> None:
        """Restore them; CheckpointError if anything does not fit."""

    def export(self, path: Path) -> None:
        """Write the model directory."""


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


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of `step`: linear warm-up, then a cosine, or VAR's "lin0" (flat for 5 %, then linear)."""
    warmup = config.warmup * config.steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(config.steps - warmup, 1), 1.0)
    fall = max(progress - 0.05, 0) / 0.95 if config.schedule == "lin0" else 0.5 - 0.5 * math.cos(math.pi * progress)
    return config.lr * (1 - (1 - config.final_lr) * fall)


class Optimizer:
    """AdamW with the schedule, gradient clipping and an average of the weights (EMA).

    With "muon" the matrices of the transformer blocks are updated by orthogonalised momentum instead (Jordan et al.
    2024), scaled so that the same learning rate serves both.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, averaged: nn.Module | None = None) -> None:
        self.config = config
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        # As published: only weights of layers decay, not positions, levels, tokens, the codebook or attention scales.
        decay: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, p in zip(self.names, self.parameters, strict=True):
            matrix = p.ndim > 1 and name.endswith("weight") and name != "level.weight"
            (decay if matrix else plain).append(p)
        groups: list[dict[str, Any]] = [
            {"params": decay, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        matrices: list[nn.Parameter] = []
        if config.optimizer == "muon":
            matrices = [p for name, p in module.named_parameters() if p.ndim == 2 and "blocks." in name]
            inside = {id(p) for p in matrices}
            for group in groups:
                group["params"] = [p for p in group["params"] if id(p) not in inside]
        adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)
        self.optimizers: list[torch.optim.Optimizer] = [adamw]
        if matrices:
            muon = torch.optim.Muon(
                matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self.optimizers.append(muon)
        self.averaged = list[Tensor](averaged.parameters()) if averaged is not None else None

    def clip(self) -> Tensor:
        """Clip the gradients; their global norm before that."""
        limit = self.config.grad_clip or math.inf
        return nn.utils.clip_grad_norm_(self.parameters, limit)

    def update(self, step: int, ratio: float = 1.0) -> float:
        """Apply the gradients with `ratio` times the scheduled rate, which is returned; then forget them."""
        rate = learning_rate(self.config, step) * ratio
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.forget()
        if self.averaged is not None:
            decay = min(self.config.ema, (1 + step) / (10 + step))  # follows quickly at first
            torch._foreach_lerp_(self.averaged, list[Tensor](self.parameters), 1 - decay)
        return rate

    def forget(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name; empty before the first update."""
        names = {id(p): name for name, p in zip(self.names, self.parameters, strict=True)}
        return {
            f"{names[id(p)]}/{key}": value
            for optimizer in self.optimizers
            for p, moments in optimizer.state.items()
            for key, value in moments.items()
        }

    def load_state(self, state: Mapping[str, Tensor], source: Path) -> None:
        """Restore `state()`.

        Raises:
            CheckpointError: a moment is missing or has another shape.
        """
        if not state:
            return
        names = {id(p): name for name, p in zip(self.names, self.parameters, strict=True)}
        for optimizer in self.optimizers:
            keys = (
                ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ("step", "exp_avg", "exp_avg_sq")
            )
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                name, moments = names[id(p)], {}
                for key in keys:
                    value = state.get(f"{name}/{key}")
                    if value is None or (key != "step" and value.shape != p.shape):
                        raise CheckpointError(f"{source}: optimiser state of {name} is missing or has another shape")
                    moments[key] = value.clone().to(p.device)  # the fused kernel wants the step there too
                optimizer.state[p] = moments


@dataclass
class Run:
    """A run folder: `run.json`, `config.json`, `log.jsonl`, `checkpoints/`, and the exported `model/`."""

    path: Path

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line of JSON."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: None if v != v else v for k, v in record.items()}) + "\n")

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        found = (self.path / "checkpoints").glob("step-*")
        return sorted((p for p in found if p.name[5:].isdigit()), reverse=True)

    def save(self, step: int, stage: Stage) -> None:
        """Write the checkpoint of `step` and drop all but the newest `KEEP`."""
        target = self.path / "checkpoints" / f"step-{step:08d}"
        checkpoint.replace_directory(target, stage.state(), {"state": {"step": step}})  # there may be a damaged one
        for old in self.checkpoints()[KEEP:]:
            doomed = old.with_name(f".del-{old.name}")
            old.rename(doomed)
            shutil.rmtree(doomed)

    def restore(self, stage: Stage, say: Callable[[str], None]) -> int:
        """Load the newest checkpoint that is intact; the number of steps done, 0 without one.

        Raises:
            CheckpointError: there are checkpoints but none can be used.
        """
        problem: CheckpointError | None = None
        for path in self.checkpoints():
            try:
                checkpoint.verify(path)
                step = int(checkpoint.read_json(path / "state.json")["step"])
                names = [p.stem for p in path.glob("*.safetensors")]
                state = {n: checkpoint.read_tensors(path / f"{n}.safetensors") for n in names}
            except CheckpointError as error:
                problem = error
                say(f"warning: {error}; trying the checkpoint before it")
                continue
            stage.load_state(state, path)
            return step
        if problem is not None:
            raise CheckpointError(f"no usable checkpoint in {self.path / 'checkpoints'}; the last problem: {problem}")
        return 0


def run(
    stage: Stage,
    folder: Run,
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
    logged, bad = done, 0

    def load(step: int) -> list[Any]:
        indices = batch_indices(seed, step, batch, notes)
        return [stage.batch(part) for part in np.split(indices, train.accumulate)]

    def save() -> None:
        folder.save(done, stage)
        stage.export(folder.path / "model")

    with (
        _stop_signals() as stop,
        _progress(console) as progress,
        ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as loader,
    ):
        task = progress.add_task("", total=end, completed=done, info="")
        upcoming = loader.submit(load, done) if done < end else None
        while done < end and not stop() and not (max_time and time.monotonic() - began > max_time):
            assert upcoming is not None
            batches = upcoming.result()
            upcoming = loader.submit(load, done + 1) if done + 1 < end else None
            metrics = stage.step(done, batches, stream(seed, 1, done))
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
