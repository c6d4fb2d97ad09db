"""mars-generate: new notes as WAV files."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mars.cli.errors import user_errors

PICTURES = 64  # at most, on the contact sheet
SILENT = 1e-3  # peak, -60 dBFS


def _pitch(_: click.Context, __: click.Parameter, value: str | None) -> int | tuple[int, int] | None:
    if value is None:
        return None
    low, dash, high = value.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()) or not int(low) <= int(high or low) <= 127:
        raise click.BadParameter(f"want a MIDI number 0..127 or a range such as 48-72 (60 is middle C), got {value!r}")
    return (int(low), int(high)) if dash else int(low)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
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
    --source and --velocity need a model that was trained with them.
    """
    out = out or Path("generated") / time.strftime("%Y%m%d-%H%M%S")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise click.BadParameter(f"{out} exists and is not an empty folder; name a new one", param_hint="--out")
    with user_errors():
        _generate(n, model, out, threads, device, settings)


def _generate(n: int, name: str | None, out: Path, threads: int | None, device: str, settings: dict[str, Any]) -> None:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mars.audio import write_wav
    from mars.files import sha256, write_atomically
    from mars.generate import Timing, generate, listing, stem
    from mars.model import DEFAULT, load
    from mars.picture import contact_sheet, write_png
    from mars.runtime import free_space, pick_device, set_threads

    set_threads(threads)
    model = load(name, pick_device(device))
    timing, began = Timing(), time.monotonic()
    notes = generate(model, n, **settings, timing=timing)
    free_space(out, n * (2 * model.config.audio.samples + 1024) + 16 * 2**20)  # 16 MB: the picture
    out.mkdir(parents=True, exist_ok=True)

    records: list[dict[str, Any]] = []
    pictures: list[torch.Tensor] = []
    silent = 0
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=n, rate="")
        for done, note in enumerate(notes, 1):
            file = out / f"{stem(note.index, n, note.condition)}.wav"
            write_wav(file, note.waveform, model.config.audio.sample_rate)
            records.append(
                {"index": note.index, "file": file.name, "condition": note.condition, "sha256": sha256(file)}
            )
            silent += float(note.waveform.abs().max()) < SILENT
            if len(pictures) < PICTURES:
                pictures.append(note.spectrogram)
            bar.update(task, completed=done, rate=f"{done / (time.monotonic() - began):.1f} notes/s")

    labels = [Path(r["file"]).stem for r in records[: len(pictures)]]
    write_png(out / "spectrograms.png", contact_sheet(torch.stack(pictures), labels, height=256, width=128))
    document = listing(model, {"model": str(name or DEFAULT), "n": n, **settings}, records)
    write_atomically(out / "notes.json", (json.dumps(document, indent=1) + "\n").encode())
    if silent:
        click.echo(f"warning: {silent} of {n} notes are silent", err=True)
    parts = ", ".join(f"{part.replace('_', '-')} {seconds:.1f}" for part, seconds in asdict(timing).items())
    click.echo(f"{n} notes in {out}: {time.monotonic() - began:.1f} s ({parts})")


if __name__ == "__main__":
    main()
