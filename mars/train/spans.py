"""The named parts of a training step.

While nothing is profiled a part only marks PyTorch's own trace. In a profile the device is waited for at both ends of a
part, so that each part's time is its own, at the price of some overlap.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function


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
    """Mark the block as a named part of a step."""
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
def timed(device: torch.device, modules: Mapping[str, nn.Module]) -> Iterator[dict[str, float]]:
    """Time the parts of the steps in the block; the forward passes of `modules` are parts too."""
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
