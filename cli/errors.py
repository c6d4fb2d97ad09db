"""What a user's mistake looks like: one line, the way out, and an exit code."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import click

from mars.errors import DiskError, MarsError


class Failure(click.ClickException):
    """An error message with its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = code  # type: ignore[misc]  # a class variable to mypy


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn the library's errors, and those of the disk, into one-line messages with their codes."""
    try:
        yield
    except MarsError as error:
        raise Failure(str(error), error.code) from error
    except KeyboardInterrupt:
        raise Failure("interrupted", 128 + signal.SIGINT) from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise Failure(str(error), DiskError.code if full else MarsError.code) from error
