"""Contenders timed in turn, in one run: on a machine that others use too, only ratios of such times mean anything."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Place:
    """Where a benchmark runs: a device, and on a CPU the number of threads."""

    device: str
    threads: int

    def __str__(self) -> str:
        return "cuda" if self.device == "cuda" else f"{self.threads} thread{'s' * (self.threads > 1)}"

    def clock(self) -> float:
        """Seconds: of the one thread's own work, which other jobs do not disturb, else of the wall clock."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.thread_time() if self.device == "cpu" and self.threads == 1 else time.perf_counter()


@dataclass
class Contender:
    """Something to time. `flop` and `bytes` of one call are what its rates are derived from."""

    run: Callable[[], Any]
    flop: float = 0
    bytes: float = 0
    check: Callable[[Any, Any], None] | None = None  # (its result, the first one's); None: nothing to compare
    seconds: list[float] = field(default_factory=list)
    peak_memory: int = 0


def sized(benchmark: Any, rows: int) -> int:
    """`rows`, or few where nothing is timed and only the results are compared."""
    return rows if benchmark.enabled else min(rows, 256)


def race(
    benchmark: Any,
    place: Place,
    contenders: dict[str, Contender],
    *,
    rounds: int = 5,
    targets: dict[str, float] | None = None,
) -> None:
    """Check all contenders against the first, then time them in turn, `rounds` times each.

    The first one is also what pytest-benchmark shows. Everything goes into the result's `extra_info`, from which
    scripts/bench_report.py makes the table. targets: for a contender's name, how many times as long as the first it is
    meant to take at least; for the first one's own name, the fraction of the last contender's rate ("peak").
    """
    first, *peers = contenders.values()
    result = first.run()
    for peer in peers:
        if peer.check is not None:
            peer.check(peer.run(), result)
    if not benchmark.enabled:
        benchmark(first.run)
        return
    del result

    def timed(contender: Contender) -> None:
        if place.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = place.clock()
        contender.run()
        contender.seconds.append(place.clock() - start)
        if place.device == "cuda":
            contender.peak_memory = torch.cuda.max_memory_allocated()

    def others() -> None:
        gc.collect()
        for peer in peers:
            timed(peer)

    for peer in peers:
        peer.run()
    benchmark.pedantic(timed, (first,), setup=others, rounds=rounds, warmup_rounds=1)
    for contender in contenders.values():
        contender.seconds = contender.seconds[-rounds:]  # without the warm-up
    benchmark.extra_info |= {
        "place": str(place),
        "targets": targets or {},
        "contenders": {
            name: {
                "median": statistics.median(c.seconds),
                "min": min(c.seconds),
                "max": max(c.seconds),
                "flop": c.flop,
                "bytes": c.bytes,
                "peak_memory": c.peak_memory,
            }
            for name, c in contenders.items()
        },
    }
