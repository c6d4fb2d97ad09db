"""Packages that only some features need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mars.errors import MissingPackage


@contextmanager
def needed(purpose: str, *packages: str) -> Iterator[None]:
    """Import in the block what a purpose needs of packages that need not be installed.

    Raises:
        MissingPackage: one is not; it names the packages themselves, for no index holds mars and its extras.
    """
    try:
        yield
    except ImportError:
        names = " ".join(packages)
        raise MissingPackage(f"{purpose} needs {' and '.join(packages)}; run: pip install {names}") from None
