"""The errors that a user can meet, and the exit code of each.

A message is one line: what was wanted, what was got, what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class MarsError(Exception):
    """The base class of all errors of mars."""

    code: ClassVar[int] = 1


class ConfigError(MarsError, ValueError):
    """A setting that cannot be used."""

    code = 2


class CheckpointError(MarsError, ValueError):
    """A model or checkpoint that is missing, damaged or of another kind."""

    code = 2


class DataError(MarsError, ValueError):
    """Notes or a dataset that cannot be used."""

    code = 2


class TooManyBadError(DataError):
    """More of the files are bad than is allowed."""

    code = 3


class BadFileError(DataError):
    """One file cannot be used; the message is the reason, without the file's name."""


class Diverged(MarsError, RuntimeError):
    """Too many steps in a row whose loss or gradient was not finite, or weights that are not."""

    code = 5


class KernelError(MarsError, RuntimeError):
    """An implementation of the ops was asked for by name and cannot run here."""

    code = 2


class MissingPackage(ConfigError):
    """An optional package is not installed that the requested action needs."""


class LostProcess(MarsError, RuntimeError):
    """Another of the processes that work together is gone."""


class DiskError(MarsError, OSError):
    """There is no room on the disk, or it cannot be written."""

    code = 6


@contextmanager
def needed(purpose: str, *packages: str) -> Iterator[None]:
    """Import optional packages in the block, and turn a missing one into an error that names it and the purpose.

    Raises:
        MissingPackage: one is not; it names the packages themselves, for no index holds mars and its extras.
    """
    try:
        yield
    except ImportError:
        names = " ".join(packages)
        raise MissingPackage(f"{purpose} needs {' and '.join(packages)}; run: pip install {names}") from None
