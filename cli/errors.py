"""How errors are shown: one line with what to do, and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from mars.cli.options import common, in_options
from mars.errors import ConfigError, DiskError, MarsError
from mars.text import printable

_ADVICE = {  # for errors of the system; the codes are those of the library's errors of that kind
    errno.ENOSPC: (DiskError.code, "make room"),
    errno.EDQUOT: (DiskError.code, "make room"),
    errno.EFBIG: (DiskError.code, "raise the limit on the size of files (ulimit -f)"),
    errno.EROFS: (DiskError.code, "name a place that can be written"),
    errno.EACCES: (ConfigError.code, "ask for the permission or name another place"),
    errno.EPERM: (ConfigError.code, "ask for the permission or name another place"),
    errno.ENAMETOOLONG: (ConfigError.code, "choose a shorter name"),
    errno.ENOENT: (ConfigError.code, "check the path"),
    errno.ENOTDIR: (ConfigError.code, "check the path"),
    errno.EISDIR: (ConfigError.code, "check the path"),
    errno.ELOOP: (ConfigError.code, "check the path"),
}


class Failure(click.ClickException):
    """An error message with its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(one_line(message))
        self.exit_code = code  # type: ignore[misc]  # a class variable to mypy


def one_line(message: str) -> str:
    """Return a message as one line that is safe for a terminal, whatever characters it holds."""
    return printable(" ".join(filter(None, (line.strip() for line in message.splitlines()))))


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn the library's errors, and those of the disk, into one-line messages with their codes."""
    try:
        yield
    except click.ClickException as error:  # a usage error quotes what was typed
        vars(error)["message"] = one_line(error.message)  # declared final; a copy would lose its kind and its context
        raise
    except MarsError as error:
        raise Failure(in_options(str(error)), error.code) from error
    except KeyboardInterrupt:
        raise Failure("interrupted", 128 + signal.SIGINT) from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read the output has seen enough; click ends without a word
            raise
        code, advice = _ADVICE.get(error.errno or 0, (MarsError.code, ""))
        parts = (error.filename, error.strerror or str(error) or type(error).__name__)
        raise Failure(": ".join(str(part) for part in parts if part) + f"; {advice}" * bool(advice), code) from error


@contextmanager
def whole_imports() -> Iterator[None]:
    """Let a Ctrl-C wait for the end of an import, or of a callback of soundfile; a second one does not wait.

    There C code would take a KeyboardInterrupt for another error, or print it and go on.
    """
    main = threading.current_thread() is threading.main_thread()
    if sys.platform == "win32" or not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    waiting: list[threading.Timer] = []

    def again() -> None:
        waiting.clear()
        os.kill(os.getpid(), signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame is not None and not _called_from_c(frame):
            frame = frame.f_back
        if frame is None:
            raise KeyboardInterrupt
        if waiting:
            os.write(2, b"Error: interrupted\n")
            os._exit(128 + number)
        waiting.append(threading.Timer(0.02, again))
        waiting[0].daemon = True
        waiting[0].start()

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for timer in waiting:
            timer.cancel()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _called_from_c(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_filename.startswith("<frozen importlib") or (
        code.co_name.startswith("vio_") and os.path.basename(code.co_filename) == "soundfile.py"
    )


class _ReportsErrors:
    """A mix-in for Click commands with the common options, which reports every error through `user_errors`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params: list[click.Parameter] = [*self.params, *common()]

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with user_errors():
            return super().make_context(*arguments, **options)  # type: ignore[misc]

    def main(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().main(*arguments, **options)  # type: ignore[misc]
        except SystemExit as end:
            distributed = sys.modules.get("mars.runs.distributed")  # most commands never need it
            if distributed is not None and isinstance(end.code, int):
                distributed.leave(end.code)
            raise

    def invoke(self, context: click.Context) -> Any:
        with user_errors(), whole_imports():
            return super().invoke(context)  # type: ignore[misc]


class Command(_ReportsErrors, click.Command):
    """A `click.Command` whose errors are reported by `user_errors`."""


class Group(_ReportsErrors, click.Group):
    """A `click.Group` whose errors, and those of its commands, are reported by `user_errors`."""

    command_class = Command
