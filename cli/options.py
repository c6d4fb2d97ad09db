"""What a command line says of values: how times, sizes and runs are written, and which option an argument is.

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
    """A text of the library with the options of the running command in place of the arguments that it names."""
    context = click.get_current_context(silent=True)
    if context is None:
        return text
    options = {p.name: max(p.opts, key=len) for p in context.command.params if isinstance(p, click.Option)}
    return _NAMED.sub(lambda found: options.get(found[1]) or TYPED.get(found[1]) or found[0], text)


def seconds(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """The seconds of a time such as 90s, 40m or 2h, or of a plain number of seconds."""
    if value is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (value[:-1], units[value[-1]]) if value[-1:] in units else (value, 1)
    try:
        found = float(number) * unit
    except ValueError:
        found = -1
    if not 0 < found < float("inf"):
        raise click.BadParameter(f"want a time such as 90s, 40m or 2h, got {value!r}")
    return found


def size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """The bytes of a size such as 32GB (10^9 each) or 24GiB (2^30)."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d*)?) ?([MGT])(i?)B", value)
    count = float(found[1]) * (1024 if found[3] else 1000) ** ("MGT".index(found[2]) + 2) if found else 0
    if not 0 < count < 1 << 60:
        raise click.BadParameter(f"want a size such as 32GB or 24GiB, got {value!r}")
    return int(count)


def pitches(_: click.Context, __: click.Parameter, value: str | None) -> int | tuple[int, int] | None:
    """One pitch, or (lowest, highest) of a range, as MIDI numbers or names of notes."""
    from mars.labels import pitches_of

    try:
        low, high = pitches_of(value) if value is not None else (None, None)
    except ValueError as error:
        raise click.BadParameter(f"{error}; or a range such as 48-72 or C3-C5") from None
    return low if low == high or high is None else (low, high)  # type: ignore[return-value]


def resume(_: click.Context, __: click.Parameter, value: str) -> str | Path:
    """One of the words auto and never, or else the path of a run."""
    return value if value in ("auto", "never") else Path(value)
