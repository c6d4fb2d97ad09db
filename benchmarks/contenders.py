"""Contenders timed in turn, in one run: on a machine that others use too, only ratios of such times mean anything."""

from __future__ import annotations

import gc
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mars.runtime import peak_memory

COPY, PRODUCT = "copy of 256 MiB", "bfloat16 product of 8192 x 8192"  # a GPU's ceilings


@dataclass(frozen=True)
class Place:
    """Where a benchmark runs: a device, and on a CPU the number of threads."""

    device: str
    threads: int

    def __str__(self) -> str:
        return "cuda" if self.device == "cuda" else f"{self.threads} thread{'s' * (self.threads > 1)}"

    def clock(self, wall: bool) -> float:
        """Seconds: of the one thread's own work, which other jobs do not disturb, else of the wall clock."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        own = self.device == "cpu" and self.threads == 1 and not wall
        return time.thread_time() if own else time.perf_counter()


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
    wall: bool = False,
    memory: bool = False,
    patience: float = math.inf,
) -> None:
    """Check all contenders against the first, then time them in turn, `rounds` times each; on a GPU its ceilings too.

    The first one is also what pytest-benchmark shows. Everything goes into the result's `extra_info`, from which
    scripts.bench_report makes the table. targets: for a contender's name, how many times as long as the first it is
    meant to take at least; for "rate", which fraction of the last contender's rate the first is meant to reach.
    wall: by the clock on one thread too, for what works in threads of its own.
    memory: also the most memory that tensors take during one call; "memory" in targets: which fraction of the last
    contender's the first is meant to take at most.
    patience: seconds in all that a peer may take; one that has taken as many is left out of the rounds that follow.
    """
    contenders = contenders | _ceilings(place)
    first, *peers = contenders.values()
    result = first.run()
    if not benchmark.enabled:
        for peer in peers:
            if peer.check is not None:
                peer.check(peer.run(), result)
        benchmark(first.run)
        return
    for peer in peers:  # what is compared is warm thereby
        theirs = peer.run()
        if peer.check is not None:
            peer.check(theirs, result)
        del theirs
    del result
    first.run()

    def timed(contender: Contender) -> None:
        if place.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = place.clock(wall)
        contender.run()
        contender.seconds.append(place.clock(wall) - start)
        if place.device == "cuda":
            contender.peak_memory = torch.cuda.max_memory_allocated()

    def others() -> None:
        gc.collect()
        for peer in peers:
            if sum(peer.seconds) < patience:
                timed(peer)

    try:
        benchmark.pedantic(timed, (first,), setup=others, rounds=rounds)
        if memory:
            for contender in contenders.values():
                contender.peak_memory = peak_memory(contender.run, torch.device(place.device))
    finally:  # of a run that is interrupted, what was timed until then
        if first.seconds:
            benchmark.extra_info |= {
                "place": str(place),
                "targets": targets or {},
                "device_memory": _device_memory(place),
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


def _ceilings(place: Place) -> dict[str, Contender]:
    """On a GPU, how fast it copies and multiplies: what the rates of the others are fractions of."""
    if place.device != "cuda":
        return {}
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    return {
        COPY: Contender(lambda: target.copy_(source), bytes=2 * source.numel()),
        PRODUCT: Contender(lambda: matrix @ matrix, flop=2 * len(matrix) ** 3),
    }


def _device_memory(place: Place) -> int:
    """Bytes in use on the GPU as its driver counts them; 0 on a CPU, or without nvidia-ml-py (the extra `bench`)."""
    if place.device != "cuda" or importlib.util.find_spec("pynvml") is None:
        return 0
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
