"""Consoles and progress bars: paths and names are shown as they are, whatever characters they hold."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from mars.text import printable


class PlainConsole(Console):
    """A console that prints strings as plain text, without markup, emoji, highlighting or escape sequences."""

    def render_str(self, text: str, *, style: Any = "", **_: Any) -> Text:
        return Text("\n".join(map(printable, text.split("\n"))), style)


def console(*, stderr: bool = True, soft_wrap: bool = False, quiet: bool = False) -> Console:
    """Return a `PlainConsole`."""
    return PlainConsole(stderr=stderr, soft_wrap=soft_wrap, quiet=quiet)


def log(line: str) -> None:
    """A line for the logger `mars`: a warning if it says that it is one, else information.

    It is how the library speaks to a program that gave it no console and no function to call.
    """
    warning, told = line.startswith("warning: "), line.removeprefix("warning: ")
    logging.getLogger("mars").log(logging.WARNING if warning else logging.INFO, "%s", printable(told))


class LogConsole(PlainConsole):
    """A console that hands its lines to `log`, and has no terminal."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), force_terminal=False)

    def print(self, *objects: Any, **options: Any) -> None:
        if not self.quiet:
            log(" ".join(map(str, objects)))


class PlainColumn(TextColumn):
    """A column of a progress bar whose text is shown without markup."""

    def __init__(self, text_format: str) -> None:
        super().__init__(text_format, markup=False)

    def render(self, task: Any) -> Text:
        return Text(printable(self.text_format.format(task=task)), self.style)


class Tell(Protocol):
    """A callback that shows progress: the task, how much is done, the total (0: unknown), and further text."""

    def __call__(self, what: str, done: int, total: int, info: str = "", /) -> None: ...


@contextmanager
def progress(console: Console, *, unit: str = "", line_every: float = 0, transient: bool = False) -> Iterator[Tell]:
    """Yield a callback that shows a progress bar on a terminal for each task that it is called with.

    Args:
        unit: what is counted; the rate per second is then shown after the bar.
        line_every: where there is no terminal, a line after so many seconds; 0: none.
        transient: the bars go away at the end.
    """
    began = last = time.monotonic()
    tasks: dict[str, tuple[TaskID, int]] = {}  # with what was done before
    columns = (
        PlainColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), PlainColumn("{task.fields[info]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=transient) as bars:

        def tell(what: str, done: int, total: int, info: str = "", /) -> None:
            nonlocal last
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None, completed=done, info=info), done
            task, before = tasks[what]
            now = time.monotonic()
            rate = (done - before) / max(now - began, 1e-3)
            if unit:
                info = " ".join(filter(None, (f"{rate:.{1 if rate < 10 else 0}f} {unit}/s", info)))
            bars.update(task, completed=done, total=total or None, info=info)
            if line_every and not console.is_terminal and now - last >= line_every:
                last = now
                left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
                count = " ".join(filter(None, (f"{what}: {done:,} of {f'{total:,}' if total else '?'}", unit)))
                console.print(", ".join(filter(None, (count, info))) + left, soft_wrap=True)

        yield tell
