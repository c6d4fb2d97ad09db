"""Reports as tables in a terminal: one with its baselines, or several side by side. Needs no PyTorch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from mars.errors import ConfigError
from mars.evaluate.published import PROFILE, Published
from mars.evaluate.report import Figure, Heading, Report, Sounds
from mars.pages.html import duration, number, text
from mars.text import printable

EVALUATED = "evaluated"  # the row that is not a baseline
DIGITS = 12  # shown of a hex sum
DIFFERENCES = 8  # lines that `compare` gives at most, but for their count
SHOWN = 40  # characters of a value that differs
WIDE = 10  # characters of a name that are worth a second line

_ARROWS = {-1: "↓", 0: "", +1: "↑"}
_ASCII = str.maketrans({"↓": "v", "↑": "^", "∞": "-infinity"})

Row = Mapping[str, Figure]
Headings = Mapping[str, Heading]


def headings(*reports: Report) -> dict[str, Heading]:
    """Return how the metrics of reports are shown, in the order of tables; older reports do not say."""
    result: dict[str, Heading] = {}
    for report in reports:
        result = {**report.table, **result} if report.table else {**_known(), **result}
    measured = {
        name: Heading(name.replace("_", " "))
        for report in reports
        for row in rows(report).values()
        for name in sorted(row)
    }
    return {**result, **{name: heading for name, heading in measured.items() if name not in result}}


def _known() -> dict[str, Heading]:
    from mars.evaluate.metrics import catalogue  # which loads PyTorch

    return catalogue.headings()


def arrow(heading: Heading) -> str:
    """Return an arrow to a metric's better values: down, up, or none if that is not known."""
    return _ARROWS[heading.better]


def rows(report: Report) -> dict[str, Row]:
    """Return the evaluated set and the baselines, by name."""
    return {EVALUATED: report.metrics, **report.baselines}


def measured(rows: Iterable[Row], headings: Headings) -> list[str]:
    """Return the metrics that have a value in any row, in the order of the headings."""
    known = {name for row in rows for name, figure in row.items() if figure.value is not None}
    return [name for name in headings if name in known]


def absent(rows: Mapping[str, Row], headings: Headings) -> dict[str, list[str]]:
    """Return why metrics have no value: each reason with the metrics, and with the rows if it does not hold for all."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for row, figures in rows.items():
        for name, figure in figures.items():
            if figure.value is None:
                reasons.setdefault(figure.reason or "no reason is given", {}).setdefault(name, []).append(row)
    everywhere = {name: sum(name in row for row in rows.values()) for names in reasons.values() for name in names}
    return {
        reason: [
            headings[name].label + (f" ({', '.join(where)})" if len(where) < everywhere[name] else "")
            for name, where in names.items()
        ]
        for reason, names in reasons.items()
    }


def counts(sounds: Sounds) -> str:
    """Return how many notes a set has, and what was done to them."""
    changed = {name: getattr(sounds, name) for name in ("padded", "cut", "clipped")} | {"refused": len(sounds.refused)}
    return ", ".join([f"{sounds.notes:,} notes", *(f"{count:,} {what}" for what, count in changed.items() if count)])


def print_report(report: Report, console: Console) -> None:
    """The figures of a report with their 95 % intervals, the reasons for those that are missing, and what it is of.

    A table that is wider than the console goes on below, some columns at a time: no figure is wrapped or cut.
    """
    shown = rows(report)
    _say(console, f"{report.profile} profile, {report.mode}, seed {report.seed}, {duration(report.seconds)}", "bold")
    for name, sounds in report.sets.items():
        _say(console, f"{name}: {sounds.source}, {counts(sounds)}")
    known = headings(report)
    names = measured(shown.values(), known)
    if names:
        columns = [[name.replace(" ", "\n"), *(_cell(row.get(n)) for n in names)] for name, row in shown.items()]
        _print([["", *(_heading(known[name]) for name in names)], *columns], console)
        _say(console, "↓ lower is better, ↑ higher is better; in brackets: 95 % intervals")
    for reason, metrics in absent(shown, known).items():
        _say(console, f"not measured: {', '.join(metrics)}: {reason}")
    _say(console, f"fingerprint {report.fingerprint[:DIGITS]}")


def compare(reports: Mapping[str, Report]) -> list[str]:
    """List the differences between the reports' protocols, by file name; none: they may share a table.

    Raises:
        ConfigError: they are of two profiles.
    """
    profiles: dict[str, str] = {}
    for name, report in reports.items():
        profiles.setdefault(report.profile, name)
    if len(profiles) > 1:
        described = ", ".join(f"{profile} of {name}" for profile, name in profiles.items())
        raise ConfigError(f"want reports of one profile, got {described}; figures of two must not share a table")
    protocols = {name: json.loads(json.dumps(report.protocol)) for name, report in reports.items()}
    merged: dict[tuple[str, str], list[str]] = {}  # the same difference in several metrics is one line
    for path, words in _differences(protocols, ()):
        of_metric = len(path) > 1 and path[0] == "metrics"
        merged.setdefault((".".join(path[2:] if of_metric else path), words), []).append(".".join(path))
    lines = [
        f"{names[0]}{f' and in {len(names) - 1} more' if len(names) > 1 else ''}: {words}"
        for (_, words), names in merged.items()
    ]
    more = len(lines) - DIFFERENCES
    return lines[:DIFFERENCES] + (
        [f"and {more} more {'difference' if more == 1 else 'differences'}"] if more > 0 else []
    )


def comparison(reports: Mapping[str, Report], beside: Sequence[Published] = ()) -> dict[str, Any]:
    """What `print_comparison` shows, as JSON values.

    Raises:
        ConfigError: see `print_comparison`.
    """
    differs = compare(reports)
    _check_published(reports, beside)
    own = {
        name: {
            "profile": report.profile,
            "mode": report.mode,
            "fingerprint": report.fingerprint,
            "notes": report.sets["fake"].notes,
            "metrics": {metric: figure.value for metric, figure in report.metrics.items() if figure.value is not None},
        }
        for name, report in reports.items()
    }
    others = [
        {"name": row.name, "source": row.source, "mode": row.mode, "notes": row.notes, "metrics": dict(row.figures)}
        for row in beside
    ]
    return {"reports": own, "published": others, "differences": differs}


def print_comparison(
    reports: Mapping[str, Report], console: Console, stderr: Console, beside: Sequence[Published] = ()
) -> None:
    """The figures of reports side by side, by file name, and before them, on stderr, what `compare` says.

    Args:
        beside: what others published, in columns of its own, which say so.

    Raises:
        ConfigError: they are of two profiles; or of another than what was published.
    """
    differs = compare(reports)
    _check_published(reports, beside)
    for line in differs:
        _say(stderr, f"warning: {line}", "yellow")
    known = headings(*reports.values())
    shown = {name for row in beside for name in row.figures}
    here = set(measured((report.metrics for report in reports.values()), known))
    names = [name for name in known if name in here | shown]
    columns = [
        [
            name,
            *(report.mode, report.fingerprint[:DIGITS], f"{report.sets['fake'].notes:,}"),
            *(_cell(report.metrics.get(metric)) for metric in names),
        ]
        for name, report in reports.items()
    ]
    columns += [
        [
            row.name,
            *(row.mode, "published", "-" if row.notes is None else f"{row.notes:,}"),
            *(number(row.figures[metric]) if metric in row.figures else "-" for metric in names),
        ]
        for row in beside
    ]
    profile = next(iter(reports.values())).profile
    first = [f"{profile} profile", "mode", "fingerprint", "notes", *(_heading(known[name]) for name in names)]
    _print([first, *columns], console)
    for source in dict.fromkeys(row.source for row in beside):
        of = ", ".join(row.name for row in beside if row.source == source)
        _say(console, f"published, not computed by mars: {of}: {source}")


def _check_published(reports: Mapping[str, Report], beside: Sequence[Published]) -> None:
    found = next(iter(reports.values())).profile
    if beside and found != PROFILE:
        raise ConfigError(
            f"the published figures are of the statistics of {PROFILE}, these of {found}, and must not share a table; "
            f"evaluate with `profile` {PROFILE}"
        )


def _differences(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield where the values of the reports differ and how."""
    if all(isinstance(value, dict) for value in values.values()):
        for key in dict.fromkeys(key for value in values.values() for key in value):
            have = {report: value[key] for report, value in values.items() if key in value}
            if len(have) < len(values):
                missing = [report for report in values if report not in have]
                yield (*path, key), f"in {_listed(have)}, not in {_listed(missing)}"
            else:
                yield from _differences(have, (*path, key))
        return
    by_value: dict[str, list[str]] = {}
    for report, value in values.items():
        by_value.setdefault(text(value), []).append(report)
    if len(by_value) > 1:
        yield path, ", ".join(f"{_short(value)} in {_listed(where)}" for value, where in by_value.items())


def _short(value: str) -> str:
    if re.fullmatch("[0-9a-f]{64}", value):
        return value[:DIGITS]
    return value if len(value) <= SHOWN else f"{value[:SHOWN]}…"


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _heading(heading: Heading) -> str:
    """Return a metric's name and arrow, in lines as short as they can be."""
    words, _, embedder = heading.label.removesuffix(")").partition(" (")
    first, _, last = f"{words} {arrow(heading)}".rstrip().partition(" ")
    lines = [f"{first} {last}"] if len(words) < WIDE else [first, last]
    return "\n".join([*lines, embedder]).rstrip()


def _cell(figure: Figure | None) -> str:
    """Return the value and, below, its interval."""
    if figure is None or figure.value is None:
        return "-"
    if figure.low is None or figure.high is None:
        return number(figure.value)
    return f"{number(figure.value)}\n[{number(figure.low, 3)}, {number(figure.high, 3)}]"


def _print(columns: Sequence[Sequence[str]], console: Console) -> None:
    """Columns of cells, some of several lines: the first, of names, with as many of the others at a time as fit."""
    names, *others = ([[_plain(x, console) for x in cell.split("\n")] for cell in column] for column in columns)
    while others:
        shown = [names]
        while others and (len(shown) == 1 or sum(map(_width, [*shown, others[0]])) + len(shown) <= console.width):
            shown.append(others.pop(0))
        widths = [_width(column) for column in shown]
        _say(console, "")
        for place, row in enumerate(zip(*shown, strict=True)):
            for name, *cells in zip_longest(*row, fillvalue=""):
                figures = (
                    " " * (width - cell_len(cell) + 1) + cell for cell, width in zip(cells, widths[1:], strict=True)
                )
                padding = " " * (widths[0] - cell_len(name))
                _say(console, (name + padding + "".join(figures)).rstrip(), "" if place else "bold")
    _say(console, "")


def _width(column: Sequence[Sequence[str]]) -> int:
    return max(cell_len(line) for lines in column for line in lines)


def _say(console: Console, line: str, style: str = "") -> None:
    """A line, neither wrapped nor cut, and nothing in it taken for markup."""
    console.print(Text(_plain(line, console), style), soft_wrap=True, highlight=False)


def _plain(line: str, console: Console) -> str:
    """Return the line without what would control a terminal, in characters that the console has."""
    if console.options.ascii_only:
        line = line.translate(_ASCII)
    return printable(line).encode(console.encoding, "replace").decode(console.encoding)
