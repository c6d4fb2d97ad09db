"""Where a training step goes: `mars-train … --profile`.

The steps name their parts with `span`. While nothing is profiled that only marks PyTorch's own trace; in a profile the
device is waited for at both ends of a part, so that each part's time is its own, at the price of some overlap.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from mars.runtime import stream
from mars.train.memory import peak_memory

WARM_UP, RECORDED = 3, 5  # steps
OPERATORS = 10  # shown

_clock: _Clock | None = None


class _Clock:
    """Seconds of each part, without those of the parts inside it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.open = device, Counter[str](), list[str]()
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
def _timed(device: torch.device, modules: dict[str, nn.Module]) -> Iterator[Counter[str]]:
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


def profile_steps(stage: Any, notes: np.ndarray, *, seed: int, device: torch.device, out: Path, console: Console) -> None:
    """Train a few steps of `stage`, write a Chrome trace to `out` and print where the steps went.

    Raises:
        OSError: the trace cannot be written.
    """
    from mars.train.loop import batch_indices  # which names its parts with `span` itself

    train = stage.train

    def step(number: int) -> None:
        indices = batch_indices(seed, number, train.batch_size * train.accumulate, notes)
        with span("data"):
            batches = [stage.batch(part) for part in np.split(indices, train.accumulate)]
        stage.step(number, batches, [stream(seed, 1, number, i) for i in range(train.accumulate)])

    first = getattr(stage, "profiled_step", 0)
    for number in range(first, first + WARM_UP):
        step(number)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    parts = {name: m for name, m in stage.model.named_modules() if name == "quantizer"}
    with profile(activities=activities) as recorded, _timed(device, parts) as seconds:
        for number in range(first + WARM_UP, first + WARM_UP + RECORDED):
            step(number)
    recorded.export_chrome_trace(str(out))
    peak = peak_memory(lambda: step(first + WARM_UP + RECORDED), device)

    total = sum(seconds.values())
    table = Table("part of a step", "ms", "share", title=f"{RECORDED} steps of {train.batch_size * train.accumulate} notes")
    for name, value in seconds.most_common():
        table.add_row(name, f"{value / RECORDED * 1e3:.1f}", f"{value / total:.1%}")
    console.print(table)
    events = [e for e in recorded.key_averages() if not e.key.startswith(("mars: ", "ProfilerStep"))]
    on_device = device.type == "cuda"
    cost: Callable[[Any], float] = (lambda e: e.self_device_time_total) if on_device else (lambda e: e.self_cpu_time_total)
    operators = Table("operator", "ms", "calls", title="the most expensive operators, per step")
    for event in sorted(events, key=cost, reverse=True)[:OPERATORS]:
        operators.add_row(event.key, f"{cost(event) / RECORDED / 1e3:.1f}", f"{event.count / RECORDED:g}")
    console.print(operators)
    console.print(f"peak memory of a step, above weights and optimiser: {peak / 2**20:,.0f} MiB")
    console.print(f"trace: {out} (chrome://tracing or ui.perfetto.dev)")
