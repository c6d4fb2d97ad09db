"""What a user's mistake looks like: one line, the way out, and an exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import click

FAILURE, USAGE, BAD_DATA, NO_CHECKPOINT, DIVERGED, DISK = 1, 2, 3, 4, 5, 6


class Failure(click.ClickException):
    """An error message with its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # a class variable in click
        return self.code


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn the library's errors into one-line messages. Codes: 2 usage, 4 checkpoint, 5 diverged, 6 disk."""
    from mars.checkpoint import CheckpointError
    from mars.config import ConfigError
    from mars.data import DataError
    from mars.train.loop import Diverged

    try:
        yield
    except (ConfigError, DataError, CheckpointError) as error:
        raise Failure(str(error), USAGE) from error
    except Diverged as error:
        raise Failure(str(error), DIVERGED) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) or error.errno is None
        raise Failure(str(error), DISK if full else FAILURE) from error
