"""The console of a command, on which the library's messages name options instead of Python arguments."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from mars.cli.options import in_options
from mars.terminal import PlainConsole


class CommandConsole(PlainConsole):
    """A `PlainConsole` whose lines name the options of the command that runs."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*map(_in_options, objects), **options)


def _in_options(line: Any) -> Any:
    if isinstance(line, Text) and not line.spans:
        return Text(in_options(line.plain), line.style)
    return in_options(line) if isinstance(line, str) else line


def console(*, stderr: bool = True) -> CommandConsole:
    """Return a console for the library's messages; lines are not wrapped."""
    return CommandConsole(stderr=stderr, soft_wrap=True)
