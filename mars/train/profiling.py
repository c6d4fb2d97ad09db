"""Where a training step goes: `mars-train … --profile`.

The steps name their parts with `span`. While nothing is profiled that only marks PyTorch's own trace; in a profile the
device is waited for at both ends of a part, so that each part's time is its own, at the price of some overlap.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from mars.config import TrainConfig
from mars.runtime import stream
from mars.train.batches import batch_indices
from mars.train.memory import peak_memory

WARM_UP, RECORDED = 3, 5  # steps
OPERATORS = 10  # shown


class Profiled(Protocol):
    """What a profile asks of a stage: see `mars.train.stage.Stage`."""

    train: TrainConfig

    @property
    def model(self) -> nn.Module: ...
    def batch(self, indices: np.ndarray) -> Any: ...
    def step(self, step: int, batches: list[Any], streams: list[torch.Generator]) -> Any: ...


class _Clock:
    """Seconds of each part, without those of the parts inside it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.open = device, list[str]()
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def turn(self, name: str | None) -> None:
        """Enter the part `name`, or leave the innermost one."""
        now = self._now()
        self.seconds[self.open[-1] if self.open else "other"] += now - self.last
        self.last = now
        if name is None:
            self.open.pop()
        else:
            self.open.append(name)


_clock: _Clock | None = None  # of the profile being made


@contextmanager
def span(name: str) -> Iterator[None]:
    """A named part of a step."""
    with record_function(f"mars: {name}"):
        if _clock is None:
            yield
            return
        _clock.turn(name)
        try:
            yield
        finally:
            _clock.turn(None)


@contextmanager
def _timed(device: torch.device, modules: dict[str, nn.Module]) -> Iterator[dict[str, float]]:
    """Time the parts of steps meanwhile; the forward passes of `modules` are parts too."""
    global _clock
    _clock = _Clock(device)
    spans: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            spans.append(span(name))
            spans[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        spans.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(enter(name)).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        try:
            yield _clock.seconds
        finally:
            _clock = None


def profile_steps(
    stage: Profiled, notes: np.ndarray, *, seed: int, device: torch.device, out: Path, console: Console
) -> None:
    """Train `stage` for a few steps, write a Chrome trace of them to `out` and print where the time went.

    The steps are those around the middle of the run, so that a discriminator takes part; batches are made in between.

    Raises:
        OSError: the trace cannot be written.
    """
    train = stage.train
    first, size = train.steps // 2, train.batch_size * train.accumulate

    def step(number: int) -> None:
        with span("data"):
            parts = np.split(batch_indices(seed, number, size, notes), train.accumulate)
            batches = [stage.batch(part) for part in parts]
        stage.step(number, batches, [stream(seed, 1, number, i) for i in range(train.accumulate)])

    for number in range(first, first + WARM_UP):
        step(number)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    parts = {name: module for name, module in stage.model.named_modules() if name == "quantizer"}
    with profile(activities=activities) as recorded, _timed(device, parts) as seconds:
        for number in range(first + WARM_UP, first + WARM_UP + RECORDED):
            step(number)
    recorded.export_chrome_trace(str(out))
    peak = peak_memory(lambda: step(first + WARM_UP + RECORDED), device)
    console.print(_parts(seconds, f"{size} notes a step, mean of {RECORDED} steps"))
    console.print(_operators(recorded, device))
    console.print(f"peak memory of a step, above weights and optimiser: {peak / 2**20:,.0f} MiB")
    console.print(f"trace: {out}; open it in ui.perfetto.dev or chrome://tracing")


def _parts(seconds: dict[str, float], title: str) -> Table:
    table, total = Table("part", "ms", "share", title=title), sum(seconds.values())
    for name, value in sorted(seconds.items(), key=itemgetter(1), reverse=True):
        table.add_row(name, f"{value / RECORDED * 1e3:.1f}", f"{value / total:.1%}")
    return table


def _operators(recorded: profile, device: torch.device) -> Table:
    """The operators that take the longest by themselves: on a GPU the time of their kernels."""
    cost = attrgetter("self_device_time_total" if device.type == "cuda" else "self_cpu_time_total")
    events = [event for event in recorded.key_averages() if not event.key.startswith("mars: ")]
    table = Table("operator", "ms", "calls", title="the most expensive operators, per step")
    for event in sorted(events, key=cost, reverse=True)[:OPERATORS]:
        table.add_row(event.key, f"{cost(event) / RECORDED / 1e3:.1f}", f"{event.count / RECORDED:g}")
    return table
