"""Profiles of a training step: where its time goes."""

from __future__ import annotations

import os
from operator import attrgetter, itemgetter
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from mars.runs.stage import Stage
from mars.runtime import peak_memory, stream
from mars.train.loop import batch_indices
from mars.train.spans import span, timed

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or PyTorch prints that its profiler starts and stops

WARM_UP, RECORDED = 3, 5  # steps
OPERATORS = 10  # shown


def profile_steps(
    stage: Stage, notes: np.ndarray, *, seed: int, device: torch.device, out: Path, console: Console
) -> None:
    """Train `stage` for a few steps, write a Chrome trace of them to `out` and print where the time went.

    The steps are those around the middle of the run, so that a discriminator has joined; batches are made in between.

    Raises:
        OSError: the trace cannot be written.
    """
    out.touch()  # the profiler says nothing if it cannot write
    train = stage.train
    first, size = train.steps // 2, train.notes_per_step

    def step(number: int) -> None:
        with span("data"):
            parts = np.split(batch_indices(seed, number, size, notes), train.accumulate)
            batches = [stage.batch(part) for part in parts]
        stage.step(number, batches, [stream(seed, 1, number, i) for i in range(train.accumulate)])

    for number in range(first, first + WARM_UP):
        step(number)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    parts = {name: module for name, module in stage.model.named_modules() if name == "quantizer"}
    with profile(activities=activities, acc_events=True) as recorded, timed(device, parts) as seconds:
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
    """Return the operators that take the longest by themselves: on a GPU the time of their kernels."""
    cost = attrgetter("self_device_time_total" if device.type == "cuda" else "self_cpu_time_total")
    events = [event for event in recorded.key_averages() if not event.key.startswith("mars: ")]
    table = Table("operator", "ms", "calls", title="the most expensive operators, per step")
    for event in sorted(events, key=cost, reverse=True)[:OPERATORS]:
        table.add_row(event.key, f"{cost(event) / RECORDED / 1e3:.1f}", f"{event.count / RECORDED:g}")
    return table
