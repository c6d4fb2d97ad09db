"""Where and how things run: device, precision, threads, random streams, memory and disk space."""

from __future__ import annotations

import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from mars.errors import ConfigError, DiskError

A = TypeVar("A")
B = TypeVar("B")
Precision = Literal["auto", "float32", "bfloat16"]  # see `autocast`

# Enough for any machine, and for another's number of threads, which decides the last bits of what is computed here too.
MOST_THREADS = max(256, os.cpu_count() or 1)


def stream(seed: int, *key: int) -> torch.Generator:
    """Return a generator whose state depends on nothing but the arguments."""
    mixed = np.random.SeedSequence([seed, *key]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(mixed[0]) << 31 | int(mixed[1]) >> 1)


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads; None: as many as PyTorch chooses.

    Raises:
        ConfigError: so many threads would not start, or would only wait for each other.
    """
    if threads is None:
        return
    if not 1 <= threads <= MOST_THREADS:
        raise ConfigError(
            f"threads: want 1 to {MOST_THREADS}, got {threads}; more than the {os.cpu_count()} processors of this "
            "machine make nothing faster"
        )
    torch.set_num_threads(threads)


def pick_device(name: str | torch.device) -> torch.device:
    """Return the device called `name`; "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "auto":
        present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((n for n, there in present.items() if there), "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device {name!r:.80}: want auto, cpu, cuda, cuda:1, mps, …") from None
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError):  # the latter of a PyTorch that was built without
        raise ConfigError(f"device {name}: this machine or this PyTorch build has none; use cpu") from None
    return device


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to the device; to a GPU through pinned memory, without making the host wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast to bfloat16 where asked for or, with "auto", where the device computes in it natively."""
    on = precision == "bfloat16" or (precision == "auto" and native_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def native_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def float64_device(device: torch.device) -> torch.device:
    """Return the device, or the CPU in place of MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@contextmanager
def thread_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool in which each worker computes on one thread, for as many notes at once as workers."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # for threads yet to start, which take the number set last


def ahead(pool: Executor | None, function: Callable[[A], B], items: Iterable[A], most: int) -> Generator[B, None, None]:
    """`function(item)` of each item, in order, with up to `most` of them in work in the pool; None: one by one here.

    What is still waiting when the iteration ends early is dropped.
    """
    if pool is None:
        yield from map(function, items)
        return
    working: deque[Future[B]] = deque()
    try:
        for item in items:
            working.append(pool.submit(function, item))
            if len(working) >= most:
                yield working.popleft().result()
        while working:
            yield working.popleft().result()
    finally:
        for future in working:
            future.cancel()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 in the block without TF32 or bfloat16, whatever was set, and with deterministic cuDNN."""
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def free_space(path: Path, needed: int) -> None:
    """Raise DiskError if the disk of `path` cannot hold `needed` bytes."""
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < needed:
        raise DiskError(f"{path} has {free / 1e6:.0f} MB free; this run needs about {needed / 1e6:.0f} MB")


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that tensors held during `run()`, above what they held before it.

    On a CPU every allocation of PyTorch's is counted, those inside an operation too, so `run` takes longer than usual;
    what was held before counts as held throughout.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def process_peak(device: torch.device) -> int | None:
    """Return the peak bytes so far: of tensors on a CUDA device, else of the process in RAM; None: not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
