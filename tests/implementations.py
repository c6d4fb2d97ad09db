"""The implementations of the ops that a test can run on, by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from mars import kernels
from mars.kernels import _backend, _native

NATIVE = [] if _backend.missing("native", "cpu") else [f"native {level}" for level in _native.LEVELS]


@contextmanager
def running(implementation: str) -> Iterator[None]:
    """Run on "reference", "native <level>" or "triton"."""
    name, _, level = implementation.partition(" ")
    with ExitStack() as stack:
        stack.enter_context(kernels.use(name))
        if level:
            if level not in _native.levels():
                pytest.skip(f"this processor has no {level}")
            stack.enter_context(_native.use_level(level))
        yield
