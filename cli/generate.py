"""mars-generate: new notes as WAV files."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from mars.cli.errors import Command, user_errors
from mars.text import printable


def _pitch(_: click.Context, __: click.Parameter, value: str | None) -> int | tuple[int, int] | None:
    if value is None:
        return None
    low, dash, high = value.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()) or not int(low) <= int(high or low) <= 127:
        raise click.BadParameter(f"want a MIDI number 0..127 or a range such as 48-72 (60 is middle C), got {value!r}")
    return (int(low), int(high)) if dash else int(low)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-n", "n", type=click.IntRange(min=1), default=64, show_default=True, help="How many notes.")
@click.option("--model", metavar="PATH|NAME", help="Run folder, model or packaged model; default: the packaged one.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the files; default: a new one in generated/.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="The same seed gives the same notes.",
)
@click.option("--pitch", callback=_pitch, metavar="60|48-72", help="MIDI number or range; default: as trained on.")
@click.option("--family", help="Instrument family, e.g. brass; default: a random one for each note.")
@click.option("--source", help="acoustic, electronic or synthetic; default: the family's most common one.")
@click.option("--velocity", type=click.IntRange(0, 127), help="Default: a random one for each note.")
@click.option("--instrument", metavar="NAME", help="One that the model was trained on; default: any, for each note.")
@click.option(
    "--allow-untrained",
    is_flag=True,
    help="Ask for pitches and other labels out of the range that the model was trained on, all the same.",
)
@click.option(
    "--cfg",
    type=click.FloatRange(min=0),
    default=2.0,
    show_default=True,
    help="Guidance; 0: none, twice as fast.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    default=900,
    show_default=True,
    help="Likeliest tokens to draw from.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.96,
    show_default=True,
    help="Their mass; 1: all.",
)
@click.option(
    "--iterations",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    help="Of Griffin-Lim, which finds the phase.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Notes finished together; same notes.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: PyTorch's choice.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
def main(n: int, model: str | None, out: Path | None, threads: int | None, device: str, **settings: Any) -> None:
    """Generate notes: WAV files, a picture of their spectrograms, and notes.json.

    Seed, settings, device and number of threads decide every byte of the WAV files. --pitch, --family,
    --source, --velocity and --instrument need a model that was trained with them (var.condition). The same
    command with the same --out goes on where an interrupted one was; a folder of anything else is refused.
    """
    with user_errors():
        _generate(n, model, out, threads, device, settings)


def _generate(
    n: int, name: str | None, out: Path | None, threads: int | None, device: str, settings: dict[str, Any]
) -> None:
    from mars import terminal
    from mars.files import new_folder
    from mars.labels import LABELS
    from mars.model import DEFAULT, Timing, load
    from mars.notes import NoteFolder, fill, stem
    from mars.runtime import set_threads

    set_threads(threads)
    model = load(name, device)
    requested = {label: settings[label] for label in LABELS}
    drawn = {key: value for key, value in settings.items() if key not in requested}
    conditions = model.choose(n, **requested, seed=settings["seed"], allow_untrained=settings["allow_untrained"])
    model.iterate(n, conditions=conditions, **drawn)  # for its checks, before anything is written
    files = [f"{stem(i, n, condition)}.wav" for i, condition in enumerate(conditions)]
    made = {**model.record, "model": str(name or DEFAULT), "n": n, **settings}
    out = out or new_folder(Path("generated"), time.strftime("%Y%m%d-%H%M%S"))
    timing, began = Timing(), time.monotonic()
    say = partial(click.echo, err=True)
    with (
        fill(NoteFolder(out, made, files, conditions, model.config.audio, picture=True), say) as folder,
        terminal.progress(terminal.console(), unit="notes") as tell,
    ):
        say(f"notes: {printable(str(out))}; if interrupted, go on with --out {printable(str(out))}")
        there = n - len(folder.missing)
        done = there
        tell("notes", done, n)
        for start, stop in folder.runs():
            chosen = conditions[start:stop]
            for note in model.iterate(stop - start, start=start, conditions=chosen, **drawn, timing=timing):
                folder.add(note.index, note.waveform)
                done += 1
                tell("notes", done, n)
        filled = folder.finish()
    if filled.silent:
        say(f"warning: {filled.silent} of {n} notes are silent")
    before = f" ({there} were there)" if there else ""
    parts = ", ".join(f"{part.replace('_', '-')} {seconds:.1f}" for part, seconds in asdict(timing).items())
    click.echo(f"{n} notes in {printable(str(out))}{before}: {time.monotonic() - began:.1f} s ({parts})")


if __name__ == "__main__":
    main()
