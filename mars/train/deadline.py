"""A limit on the time of training: stopping early enough for the last save."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Deadline:
    """Decides whether there is time for more work, which is expected to last as long as the longest of its kind so far.

    Args:
        seconds: from now; None: there is no deadline.
        expected: seconds that a kind of work may last, until one is measured.
    """

    def __init__(self, seconds: float | None, expected: Mapping[str, float] | None = None) -> None:
        self.end = math.inf if seconds is None else time.monotonic() + seconds
        self.expected = dict(expected or {})
        self.longest: dict[str, float] = {}

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Measure the block as one piece of work."""
        start = time.monotonic()
        yield
        self.longest[kind] = max(self.longest.get(kind, 0.0), time.monotonic() - start)

    def leaves_time_for(self, *kinds: str) -> bool:
        """Return whether one piece of each kind would end in time."""
        needed = sum(self.longest.get(kind, self.expected.get(kind, 0.0)) for kind in kinds)
        return time.monotonic() + needed <= self.end

    @property
    def left(self) -> float:
        """Seconds until it; infinite without one."""
        return self.end - time.monotonic()
