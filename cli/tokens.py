"""The sound of a folder of tokens: mars-generate --tokens."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mars.text import printable

_TAKEN = ("tokens", "n", "model", "out", "seed", "iterations", "threads", "device", "as_json")


def sound(
    source: Path, name: str | None, out: Path | None, threads: int | None, device: str, as_json: bool,
    settings: dict[str, Any],
) -> None:  # fmt: skip
    """Write the notes of a folder of tokens as `mars-generate` writes generated ones."""
    from mars.cli.console import bars, print_json, result, say
    from mars.data.tokens import read
    from mars.files import new_folder
    from mars.model import DEFAULT, decode_notes, load
    from mars.notes import PAGE, NoteFolder, fill, stem
    from mars.runtime import set_threads

    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") == ParameterSource.COMMANDLINE
        if given and option.expose_value and option.name not in _TAKEN:
            raise click.UsageError(f"{option.opts[0]} is for generated notes; with --tokens leave it out")
    set_threads(threads)
    tokens, model = read(source), load(name, device)
    tokens.check(f"`tokens` {source}", model.tokenizer, model.config)
    asked = context.get_parameter_source("n") == ParameterSource.COMMANDLINE
    n = len(tokens.ids) if not asked else context.params["n"]
    if not 0 < n <= len(tokens.ids):
        raise click.UsageError(f"{source} has {len(tokens.ids)} notes, -n asks for {n}")
    conditions = [tokens.condition(note) for note in range(n)]
    files = [f"{stem(note, n, condition)}.wav" for note, condition in enumerate(conditions)]
    drawn = {name: settings[name] for name in ("seed", "iterations")}
    origin = {**model.record, "model": str(name or DEFAULT), "n": n, "tokens": tokens.sum, **drawn}
    out = out or new_folder(Path("generated"), time.strftime("%Y%m%d-%H%M%S"))
    began = time.monotonic()
    with fill(
        NoteFolder(out, origin, files, conditions, model.config.audio, page=f"Tokens of {source.name}"), say
    ) as folder:
        say(f"notes: {out}; if interrupted, go on with --out {out}")
        there = done = n - len(folder.missing)
        with bars(unit="notes") as tell:
            tell("notes", done, n)
            for first, last in folder.runs():
                for index, waveform in decode_notes(model, tokens.ids[:n], range(first, last), **drawn):
                    folder.add(index, waveform)
                    done += 1
                    tell("notes", done, n)
        filled = folder.finish()
    if filled.silent:
        say(f"warning: {filled.silent} of {n} notes are silent")
    seconds = time.monotonic() - began
    if as_json:
        print_json({"folder": str(out), "notes": n, "were_there": there, "seconds": seconds})
    else:
        before = f" ({there} were there)" if there else ""
        result(f"{n} notes in {printable(str(out))}{before}: {seconds:.1f} s")
        result(f"listen: {printable(str(out / PAGE))}")
