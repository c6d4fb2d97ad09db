"""The grammar of option values (times, sizes, runs), and the option that each Python argument has.

The library takes typed values, and its messages name an argument, or a command that helps, in backquotes; `in_options`
puts what a user of the command would type in their place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

import mars

# What to type for what the library names, where the command at hand has no option of that name.
TYPED = {
    "mars-data folder": "mars-data folder PATH --out DIR --sample-rate HZ",
    "mars-data tokens": "mars-data tokens DATASET --model MODEL --out DIR",
    "mars-train tokenizer": "mars-train tokenizer --data DIR",
    "mars-train var": "mars-train var --tokenizer MODEL",
    "mars-eval train-classifier": "mars-eval train-classifier --task TASK --classifier KIND --data DATASET",
    "mars-eval import-sony": "mars-eval import-sony --pitch-network FILE --instrument-network FILE",
    "pitch": "--pitch-classifier",
    "profile": "--profile",
    "instrument": "--instrument-classifier",
    "vggish_weights": "--vggish",
}
_NAMED = re.compile("`([a-z][a-z_ -]*)`")


def in_options(text: str) -> str:
    """Replace the Python arguments that a text of the library names by the options of the running command."""
    context = click.get_current_context(silent=True)
    if context is None:
        return text
    options = {
        p.name: next((o for o in p.opts if o.startswith("--")), p.opts[0])
        for p in context.command.params
        if isinstance(p, click.Option)
    }
    return _NAMED.sub(lambda match: options.get(match[1]) or TYPED.get(match[1]) or match[0], text)


class Renamed(click.Option):
    """An option that had other names, which are taken still but not shown: all but the first of `opts`."""

    def get_help_record(self, context: click.Context) -> tuple[str, str] | None:
        names = self.opts
        self.opts = names[:1]
        try:
            return super().get_help_record(context)
        finally:
            self.opts = names


class Listed(click.Option):
    """An option whose help, and whose completion in a shell, list what there is, looked up only then.

    In its help "{}" stands for the list.
    """

    def __init__(self, *arguments: Any, known: Callable[[], Sequence[str]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.known, self.text = known, self.help or ""

    def get_help_record(self, context: click.Context) -> tuple[str, str] | None:
        self.help = self.text.format(", ".join(self.known()))
        return super().get_help_record(context)

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.known() if name.startswith(incomplete)]


def presets() -> Sequence[str]:
    """Those of `mars-train`."""
    from mars.config import preset_names

    return preset_names()


def families() -> Sequence[str]:
    """NSynth's, which most models have."""
    from mars.labels import FAMILIES

    return FAMILIES


_QUIET = "mars.quiet"  # in what a context shares with those inside it


def quiet() -> bool:
    """Whether the running command is to keep to warnings, errors and what was asked for."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_QUIET))


def _hush(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.meta[_QUIET] = value or context.meta.get(_QUIET, False)


def _version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        click.echo(f"mars {mars.__version__}")
        context.exit()


def common() -> list[click.Parameter]:
    """The options that every command has beside its own."""
    return [
        click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_hush,
                     help="Print warnings, errors and what was asked for, nothing else."),
        click.Option(["--version"], is_flag=True, expose_value=False, callback=_version, is_eager=True,
                     help="Print the version of mars, and go."),
    ]  # fmt: skip


def seconds(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """Parse the seconds of a time such as 90s, 40m or 2h, or of a plain number of seconds."""
    if value is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (value[:-1], units[value[-1]]) if value[-1:] in units else (value, 1)
    try:
        result = float(number) * unit
    except ValueError:
        result = -1
    if not 0 < result < float("inf"):
        raise click.BadParameter(f"want a time such as 90s, 40m or 2h, got {value!r}")
    return result


def size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Parse the bytes of a size such as 32GB (10^9 each) or 24GiB (2^30)."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d*)?) ?([MGT])(i?)B", value)
    count = float(match[1]) * (1024 if match[3] else 1000) ** ("MGT".index(match[2]) + 2) if match else 0
    if not 0 < count < 1 << 60:
        raise click.BadParameter(f"want a size such as 32GB or 24GiB, got {value!r}")
    return int(count)


def labels(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str] | None:
    """The words of labels, each given as NAME=WORD; None where there are none."""
    found = {}
    for value in values:
        name, equals, word = value.partition("=")
        if not (equals and name and word):
            raise click.BadParameter(f"want NAME=WORD such as colour=red, got {value!r}")
        found[name] = word
    return found or None


def pitches(_: click.Context, __: click.Parameter, value: str | None) -> int | tuple[int, int] | None:
    """Return one pitch, or (lowest, highest) of a range, given as MIDI numbers or names of notes."""
    from mars.labels import pitches_of

    try:
        low, high = pitches_of(value) if value is not None else (None, None)
    except ValueError as error:
        raise click.BadParameter(f"{error}; or a range such as 48-72 or C3-C5") from None
    return low if low == high or high is None else (low, high)  # type: ignore[return-value]


def resume(_: click.Context, __: click.Parameter, value: str) -> str | Path:
    """Parse the words auto and never, or else the path of a run."""
    return value if value in ("auto", "never") else Path(value)
