"""What is shown on a terminal: paths and names stay what they are, whatever is in them."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import TextColumn
from rich.text import Text

from mars.text import printable


class PlainConsole(Console):
    """A console to which a string is text: not markup, not emoji, not numbers to colour, not escape sequences."""

    def render_str(self, text: str, *, style: Any = "", **_: Any) -> Text:
        return Text("\n".join(map(printable, text.split("\n"))), style)


def console(*, stderr: bool = True, soft_wrap: bool = False, quiet: bool = False) -> Console:
    """A `PlainConsole`."""
    return PlainConsole(stderr=stderr, soft_wrap=soft_wrap, quiet=quiet)


class PlainColumn(TextColumn):
    """A column of a progress bar whose text is taken as it is."""

    def __init__(self, text_format: str) -> None:
        super().__init__(text_format, markup=False)

    def render(self, task: Any) -> Text:
        return Text(printable(self.text_format.format(task=task)), self.style)
