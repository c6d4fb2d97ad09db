"""The grammar of option values (times, sizes, runs), and the option that each Python argument has.

The library takes typed values, and its messages name an argument, or a command that helps, in backquotes; `in_options`
puts what a user of the command would type in their place.
"""

from __future__ import annotations

import re
from pathlib import Path

import click

# What to type for what the library names, where the command at hand has no option of that name.
TYPED = {
    "mars-data folder": "mars-data folder PATH --out DIR --sample-rate HZ",
    "mars-train tokenizer": "mars-train tokenizer --data DIR",
    "mars-train var": "mars-train var --tokenizer MODEL",
    "mars-eval train-classifier": "mars-eval train-classifier --task TASK --preset PRESET --data DATASET",
    "mars-eval import-sony": "mars-eval import-sony --pitch FILE --instrument FILE",
    "pitch": "--pitch-classifier",
    "instrument": "--instrument-classifier",
    "vggish_weights": "--vggish",
}
_NAMED = re.compile("`([a-z][a-z_ -]*)`")


def in_options(text: str) -> str:
    """Replace the Python arguments that a text of the library names by the options of the running command."""
    context = click.get_current_context(silent=True)
    if context is None:
        return text
    options = {p.name: max(p.opts, key=len) for p in context.command.params if isinstance(p, click.Option)}
    return _NAMED.sub(lambda match: options.get(match[1]) or TYPED.get(match[1]) or match[0], text)


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


def resume(_: click.Context, __: click.Parameter, value: str) -> str | Path:
    """Parse the words auto and never, or else the path of a run."""
    return value if value in ("auto", "never") else Path(value)
