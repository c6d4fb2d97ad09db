"""Paths and names are shown as they are, whatever Rich or the terminal would make of them."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table

from mars import terminal
from mars.cli import console as cli_console
from mars.cli import evaluate
from mars.terminal import PlainColumn, PlainConsole

NAMES = ("runs/[/b]", "[red]x", ":smile: [1, 2]", "\x1b[31m\x07", "a\u202eb", "[link=file:x]y")
SHOWN = ("runs/[/b]", "[red]x", ":smile: [1, 2]", r"\x1b[31m\x07", r"a\u202eb", "[link=file:x]y")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("name", "shown"), [*zip(NAMES, SHOWN, strict=True)], ids=range(len(NAMES)))
@pytest.mark.parametrize("tty", [False, True])
def test_a_line_is_text(name, shown, tty):
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=tty, soft_wrap=True)
    console.print(f"next: {name}")
    assert file.getvalue() == f"next: {shown}\n"


def test_lines_and_tables_stay():
    file = io.StringIO()
    console = PlainConsole(file=file, soft_wrap=True)
    console.print("a\nb")
    table = Table("part", "[x]", title="5 steps")
    table.add_row("[/b]", "1.0")
    console.print(table)
    assert file.getvalue().startswith("a\nb\n")
    assert all(word in file.getvalue() for word in ("part", "[x]", "5 steps", "[/b]", "1.0"))


def test_a_bar_takes_its_words_as_they_are():
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=True, width=200)
    with Progress(PlainColumn("{task.description}"), console=console) as bar:
        bar.add_task("read [/b] \x1b]0;x\x07", total=1)
    assert r"read [/b] \x1b]0;x\x07" in file.getvalue()


def test_the_bar_of_mars_eval_takes_folders_of_any_name(monkeypatch):
    file = io.StringIO()
    shown = cli_console.CommandConsole(file=file, force_terminal=True, width=200)
    monkeypatch.setattr(cli_console, "console", lambda: shown)
    with evaluate._progress() as progress:
        progress("read notes/[/b]", 1, 2)
    assert "read notes/[/b]" in file.getvalue()


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_a_bar_shows_what_is_done_and_how_fast(clock):
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=True, width=200)
    with terminal.progress(console, unit="notes") as tell:
        tell("Packing", 10, 50)  # of which ten were there
        clock[0] += 2
        tell("Packing", 40, 50, "soon")
        tell("checking", 1, 0)
    assert "Packing" in file.getvalue()
    assert "40/50" in file.getvalue()
    assert "15 notes/s soon" in file.getvalue()
    assert "1/?" in file.getvalue()


def test_without_a_terminal_there_is_a_line_now_and_then(clock):
    file = io.StringIO()
    console = PlainConsole(file=file, width=20)
    with terminal.progress(console, unit="notes", line_every=30) as tell:
        for done, seconds in ((0, 0), (10, 29), (1240, 2), (1300, 3), (1860, 30)):
            clock[0] += seconds
            tell("Packing", done, 0 if done == 1240 else 6200)
    assert file.getvalue() == (
        "Packing: 1,240 of ? notes, 40 notes/s\nPacking: 1,860 of 6,200 notes, 29 notes/s, 149 s left\n"
    )
    with terminal.progress(console) as tell:  # and none where nobody asked for them
        clock[0] += 1000
        tell("Packing", 1, 2)
    assert file.getvalue().count("\n") == 2


def test_no_other_console_or_bar_is_made():
    """One with markup would take what is in brackets in a path for its own."""
    files = [p for folder in ("mars", "cli", "kernels") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 80
    made = [
        f"{p.name}: {line.strip()}"
        for p in files
        if p.name != "terminal.py"
        for line in p.read_text(encoding="utf-8").splitlines()
        if any(f"{before}{call}(" in line for call in ("Console", "TextColumn", "Progress") for before in " (")
    ]
    assert made == []


def test_without_a_console_the_library_speaks_to_the_log(caplog, capfd):
    with caplog.at_level(logging.INFO, logger="mars"):
        console = terminal.LogConsole()
        console.print("step 1 of [2]")
        console.print("warning: a \x1b[31mname", markup=False)
        with terminal.progress(console, line_every=1e-9) as tell:
            tell("notes", 1, 2)
            tell("notes", 2, 2)
        console.quiet = True
        console.print("nothing")
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert said[:2] == [("INFO", "step 1 of [2]"), ("WARNING", r"a \x1b[31mname")]
    assert said[-1][1].startswith("notes: 2 of 2")
    assert all(name == "mars" for name, *_ in caplog.record_tuples)
    assert capfd.readouterr() == ("", "")
