"""The console of a command: what the library says there names options, not the arguments of Python."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from mars.cli.options import in_options
from mars.terminal import PlainConsole


class CommandConsole(PlainConsole):
    """A `PlainConsole` whose strings name the options of the command that runs."""

    def render_str(self, text: str, *, style: Any = "", **options: Any) -> Text:
        return super().render_str(in_options(text), style=style, **options)


def console(*, stderr: bool = True) -> CommandConsole:
    """Made by the command, and handed to what speaks: lines are not wrapped."""
    return CommandConsole(stderr=stderr, soft_wrap=True)
