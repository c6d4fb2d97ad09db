"""The console of a command, on which the library's messages name options instead of Python arguments."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.text import Text

from mars.cli.options import in_options, quiet
from mars.terminal import PlainConsole, Tell, progress
from mars.text import printable

WARNING = "warning: "  # how a line begins that is told under --quiet too


class CommandConsole(PlainConsole):
    """A `PlainConsole` whose lines name the options of the command that runs; under --quiet it has warnings alone."""

    hushed = False  # unlike `quiet`, which keeps warnings back too

    @property
    def is_terminal(self) -> bool:
        """Whether bars can be drawn there."""
        return super().is_terminal and not self.hushed

    def print(self, *objects: Any, **options: Any) -> None:
        if not self.hushed or str(next(iter(objects), "")).startswith(WARNING):
            super().print(*map(_in_options, objects), **options)


def _in_options(line: Any) -> Any:
    if isinstance(line, Text) and not line.spans:
        return Text(in_options(line.plain), line.style)
    return in_options(line) if isinstance(line, str) else line


def console(*, stderr: bool = True) -> CommandConsole:
    """Return a console for the library's messages; lines are not wrapped."""
    made = CommandConsole(stderr=stderr, soft_wrap=True)
    made.hushed = stderr and quiet()
    return made


def say(line: str) -> None:
    """Print a line on stderr, with the options of the arguments that it names; under --quiet only a warning."""
    if line.startswith(WARNING) or not quiet():
        click.echo(printable(in_options(line)), err=True)


def result(line: str) -> None:
    """Print a line on stdout about what was done, which --quiet leaves out."""
    if not quiet():
        click.echo(line)


def print_json(document: Any) -> None:
    """Print a document on stdout, for programs; --quiet leaves it."""
    click.echo(json.dumps(document, indent=1))


@contextmanager
def bars(**options: Any) -> Iterator[Tell]:
    """`mars.terminal.progress` on the console of the command."""
    with progress(console(), **options) as tell:
        yield tell
