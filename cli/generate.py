"""mars-generate: new notes as WAV files."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mars.cli import options as grammar
from mars.cli.errors import Command, user_errors
from mars.cli.options import Listed, families, pitches
from mars.text import printable

if TYPE_CHECKING:
    from torch import Tensor

    from mars.model import Model


def _amount(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, float] | None:
    found = re.fullmatch(r"(\d*\.?\d+)(?:-(\d*\.?\d+))?", value) if value is not None else None
    low, high = (float(found[1]), float(found[2] or found[1])) if found else (-1.0, -1.0)
    if value is not None and not (0 <= low <= 1 and 0 <= high <= 1):
        raise click.BadParameter(f"want an amount from 0 to 1, or a range such as 0-1; got {value!r}")
    return None if value is None else (low, high)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-n", "n", type=click.IntRange(min=1), help="How many notes.  [default: 64; with --from 8]")
@click.option("--model", metavar="PATH|NAME", help="Run folder, model or packaged model; default: the packaged one.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the files; default: a new one in generated/.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="The same seed gives the same notes.",
)
@click.option(
    "--start",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="First note; after -n 64, --start 64 gives the seed's next.",
)
@click.option("--pitch", callback=pitches, metavar="C4|C3-C5", help="Or 60, 48-72; default: as trained on.")
@click.option(
    "--family",
    cls=Listed,
    known=families,
    help="Instrument family, as trained on, e.g. one of {}; default: a random one for each note.",
)
@click.option("--source", help="acoustic, electronic or synthetic; default: the family's most common one.")
@click.option("--velocity", type=click.IntRange(0, 127), help="Default: a random one for each note.")
@click.option("--instrument", metavar="NAME", help="One that the model was trained on; default: any, for each note.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    callback=grammar.labels,
    metavar="NAME=WORD",
    help="A label of your own that the model was trained on.",
)
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
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Below 1: likelier tokens, purer and more alike.",
)
@click.option("--from", "source_sound", type=click.Path(path_type=Path), metavar="FILE", help="Vary this sound.")
@click.option("--keep", type=click.IntRange(min=0), help="Scales of it that stay.  [default: half of them]")
@click.option("--to", "target_sound", type=click.Path(path_type=Path), metavar="FILE", help="Morph --from into this.")
@click.option("--amount", callback=_amount, metavar="0.5|0-1", help="How much of --to.  [default: 0-1]")
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
@click.option("--json", "as_json", is_flag=True, help="Print what was made, and where, as JSON.")
@click.option(
    "--tokens",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Generate nothing: make the sound of tokens, as mars-data tokens writes them.",
)
def main(
    n: int | None, model: str | None, out: Path | None, threads: int | None, device: str, as_json: bool,
    tokens: Path | None, **settings: Any,
) -> None:  # fmt: skip
    """Generate notes: WAV files, a page to hear and see them (index.html), and notes.json.

    Seed, settings, device and number of threads decide every byte of the WAV files. --pitch, --family,
    --source, --velocity and --instrument need a model that was trained with them (var.condition). The same
    command with the same --out goes on where an interrupted one was; a folder of anything else is refused.

    With --from the notes are variations of a sound: its first --keep scales stay, the others are drawn anew. With
    --to as well they lie between two sounds, all scales kept unless --keep says otherwise. Labels that are not
    given are then unknown.
    """
    with user_errors():
        if tokens is not None:
            from mars.cli.tokens import sound

            sound(tokens, model, out, threads, device, as_json, settings)
            return
        _generate(n, model, out, threads, device, as_json, settings)


def _generate(
    n: int | None, name: str | None, out: Path | None, threads: int | None, device: str, as_json: bool,
    settings: dict[str, Any],
) -> None:  # fmt: skip
    from mars.cli.console import bars, print_json, result, say
    from mars.files import new_folder
    from mars.labels import LABELS
    from mars.model import DEFAULT, Timing, load
    from mars.notes import PAGE, NoteFolder, fill, stem
    from mars.runtime import set_threads

    set_threads(threads)
    model = load(name, device)
    made_of = {key: settings.pop(key) for key in ("source_sound", "target_sound", "keep", "amount")}
    requested = {label: settings[label] for label in (*LABELS, "labels")}
    drawn = {key: value for key, value in settings.items() if key not in (*requested, "start")}
    start = settings["start"]
    record: dict[str, Any] = {}
    originals: dict[str, Tensor] = {}
    if made_of["source_sound"] is None:
        _check_alone(made_of)
        n, tokens, title = n or 64, None, "Notes"
        conditions = model.choose(
            n, **requested, seed=settings["seed"], start=start, allow_untrained=settings["allow_untrained"]
        )
    else:
        tokens, record, title, originals = _made_of(model, n, **made_of)
        n = len(tokens)
        known = {label: value for label, value in requested.items() if value is not None}
        known |= known.pop("labels", {})
        conditions = [model.ranges.accepted(known, allow_untrained=settings["allow_untrained"])] * n
    model.iterate(n, conditions=conditions, tokens=tokens, **drawn)  # for its checks, before anything is written
    files = [f"{stem(start + i, start + n, condition)}.wav" for i, condition in enumerate(conditions)]
    made = {**model.record, "model": str(name or DEFAULT), "n": n, **settings, **record}
    out = out or new_folder(Path("generated"), time.strftime("%Y%m%d-%H%M%S"))
    timing, began = Timing(), time.monotonic()
    new = NoteFolder(out, made, files, conditions, model.config.audio, first=start, page=title, originals=originals)
    with fill(new, say) as folder, bars(unit="notes") as tell:
        say(f"notes: {out}; if interrupted, go on with --out {out}")
        there = n - len(folder.missing)
        done = there
        tell("notes", done, n)
        for low, high in folder.runs():
            first = None if tokens is None else tokens[low:high]
            chosen = conditions[low:high]
            for note in model.iterate(
                high - low, start=start + low, conditions=chosen, tokens=first, **drawn, timing=timing
            ):
                folder.add(note.index, note.waveform)
                done += 1
                tell("notes", done, n)
        filled = folder.finish()
    if filled.silent:
        say(f"warning: {filled.silent} of {n} notes are silent")
    seconds = time.monotonic() - began
    if as_json:
        counts = {"notes": n, "were_there": there, **asdict(filled)}
        print_json({"folder": str(out), **counts, "seconds": seconds, **asdict(timing)})
        return
    before = f" ({there} were there)" if there else ""
    parts = ", ".join(f"{part.replace('_', '-')} {spent:.1f}" for part, spent in asdict(timing).items())
    result(f"{n} notes in {printable(str(out))}{before}: {seconds:.1f} s ({parts})")
    result(f"listen: {printable(str(out / PAGE))}")


def _check_alone(made_of: Mapping[str, Any]) -> None:
    """Refuse what has no meaning without a sound to start from."""
    for key, option in (("target_sound", "--to"), ("keep", "--keep"), ("amount", "--amount")):
        if made_of[key] is not None:
            raise click.UsageError(f"{option} is for a sound; give it as --from FILE")


def _made_of(
    model: Model,
    n: int | None,
    source_sound: Path,
    target_sound: Path | None,
    keep: int | None,
    amount: tuple[float, float] | None,
) -> tuple[Tensor, dict[str, Any], str, dict[str, Tensor]]:
    """Return the first tokens of each note, what to list of the sounds, a title, and the sounds themselves."""
    from mars.cli.console import say
    from mars.data.decode import CHANGES
    from mars.data.sound import waveform
    from mars.files import sha256

    sounds, record = {}, dict[str, Any]()
    for option, path in (("from", source_sound), ("to", target_sound)):
        if path is not None:
            sounds[option], changes = waveform(f"--{option}", path, model.config.audio)
            record |= {option: str(path), f"{option}_sha256": sha256(path)}
            if changes:
                config = model.config.audio
                shape = {"seconds": config.samples / config.sample_rate, "rate": config.sample_rate}
                done = ", ".join(text.format(**shape) for change, text in CHANGES.items() if change in changes)
                say(f"{path}: {done}")
    originals = {f"{option} {record[option]}": sound for option, sound in sounds.items()}
    if target_sound is None:
        if amount is not None:
            raise click.UsageError("--amount is for two sounds; give the other as --to FILE")
        notes = model.tokenize(sounds["from"]).expand(n or 8, -1)
        keep = len(model.config.tokenizer.scales) // 2 if keep is None else keep
        title = f"Variations of {source_sound.name}"
    else:
        low, high = amount or (0.0, 1.0)
        n = n or (1 if low == high else 8)
        if low == high and n > 1 and keep is None:
            raise click.UsageError(f"{n} notes of one amount would be the same; give a range, or --keep")
        notes = model.mix(sounds["from"], sounds["to"], [low + (high - low) * i / max(n - 1, 1) for i in range(n)])
        keep = len(model.config.tokenizer.scales) if keep is None else keep
        record["amount"] = [low, high]
        title = f"From {source_sound.name} to {target_sound.name}"
    record["keep"] = keep
    return notes[:, : model.kept(keep)], record, title, originals


if __name__ == "__main__":
    main()
