"""mars-data: packs notes into a dataset to train on, and says what a dataset holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mars.cli.errors import Group, user_errors
from mars.text import printable

if TYPE_CHECKING:
    from mars.data import Dataset

FOLDER = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print what the dataset holds as JSON.")
_LINE_EVERY = 30.0  # s between lines where there is no terminal


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (notes done, notes expected): a bar on a terminal, else a line now and then."""
    from mars.cli.console import bars

    with bars(unit="notes", line_every=_LINE_EVERY) as tell:
        yield lambda done, total: tell(label, done, total)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Pack notes into a dataset to train on."""


def _pitches(_: click.Context, __: click.Parameter, value: str) -> tuple[int, int]:
    from mars.labels import pitches_of

    try:
        return pitches_of(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _packing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return the options that every reader has."""
    out = click.option("--out", type=FOLDER, required=True, help="The new dataset; must not exist.")
    allow = click.option(
        "--allow-bad", type=click.FloatRange(0, 1), default=0.01, show_default=True,
        help="Go on if at most this fraction of the files is bad; else exit with 3.",
    )  # fmt: skip
    return out(allow(JSON(command)))


def _holding_out(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--hold-out", type=click.Choice(["instruments", "notes", "none"]),
        help="What is kept from training, to judge by.  [default: whole instruments, notes where those are few]",
    )(command)  # fmt: skip


@main.command()
@click.argument("paths", type=click.Path(exists=True, path_type=Path), nargs=-1, required=True)
@_packing
@click.option(
    "--split",
    type=click.Choice(["auto", "instrument", "train", "valid", "test"]),
    default="auto",
    show_default=True,
    help="auto: as the path says (nsynth-valid...), else by instrument, or by note where instruments are few.",
)
def nsynth(paths: tuple[Path, ...], out: Path, as_json: bool, **options: Any) -> None:
    """Pack NSynth: folders or .tar.gz archives with examples.json and audio/*.wav, several if you like."""
    with user_errors():
        from mars.data.nsynth import pack_nsynth

        with _progress("Packing") as progress:
            dataset = pack_nsynth(paths, out, progress=progress, **options)
        _report(dataset, out, as_json)


@main.command()
@click.argument("directory", type=click.Path(exists=True, path_type=Path))
@_packing
@_holding_out
@click.option(
    "--csv",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Labels: the column file, any of pitch, velocity, family, source, instrument, and any others of your own.",
)
@click.option("--sample-rate", type=click.IntRange(1000, 384_000), default=16_000, show_default=True, help="Hz.")
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=4.0, show_default=True, help="Cut or pad to this.")
@click.option(
    "--shortest",
    type=click.FloatRange(0),
    default=0.1,
    show_default=True,
    help="Shorter files are bad (s).",
)
@click.option(
    "--pitch",
    type=click.Choice(["named", "estimate"]),
    default="named",
    show_default=True,
    help="named: as the CSV or the file's name says (violin_C4.wav); estimate: else as the sound has it.",
)
@click.option("--licence", default="unknown", show_default=True, help="Of the audio; is kept.")
def folder(directory: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Pack a folder of sound files: WAV, FLAC, OGG, Opus, MP3, AIFF and, where FFmpeg is installed, others."""
    with user_errors():
        from mars.data.folder import pack_folder

        with _progress("Packing") as progress:
            dataset = pack_folder(directory, out, progress=progress, **options)
        _report(dataset, out, as_json)


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_packing
@_holding_out
@click.option("--notes", type=click.IntRange(1), help="How many, spread evenly.  [default: all there are]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of notes.")
@click.option("--pitches", default="21-108", show_default=True, callback=_pitches, help="LOW-HIGH, or as C2-C6.")
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True)
@click.option("--licence", default="unknown", show_default=True, help="Of the soundfont; is kept.")
def soundfont(file: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Render notes from an SF2 or SF3 soundfont."""
    with user_errors():
        from mars.data.soundfont import pack_soundfont

        with _progress("Rendering") as progress:
            dataset = pack_soundfont(file, out, progress=progress, **options)
        _report(dataset, out, as_json)


@main.command()
@click.argument("directory", type=click.Path(path_type=Path), required=False)
@click.option("--verify", is_flag=True, help="Also check every checksum.")
@JSON
def info(directory: Path | None, verify: bool, as_json: bool) -> None:
    """Say what a dataset holds; without DIRECTORY, the built-in notes."""
    with user_errors():
        from mars.cli.console import print_json
        from mars.data import Dataset, open_dataset
        from mars.data.summary import summary

        dataset = Dataset.open(directory, verify=verify) if directory else open_dataset(None)
        known = summary(dataset, directory)
        if as_json:
            print_json(known)
            return
        _say(known)
        click.echo(f"{dataset.samples} samples each at {dataset.sample_rate} Hz")
        click.echo("".join(f"{name:>12}" for name in ("family", *known["splits"])))
        for name, counts in known["families"].items():
            click.echo(f"{printable(name):>12}" + "".join(f"{count:>12,}" for count in counts.values()))
        for line in _labels(dataset):
            click.echo(printable(line))
        click.echo(printable("origin: " + ", ".join(f"{key} {value}" for key, value in known["origin"].items())))
        click.echo(f"fingerprint: {dataset.fingerprint}" + (" (every checksum is right)" if verify else ""))


def _labels(dataset: Dataset) -> Iterator[str]:
    """What is known of the notes, a line for each label but the family."""
    import numpy as np

    from mars.data.packed import CONFIDENCE
    from mars.labels import SOURCES, note_name, some

    words = {"source": SOURCES, **dataset.words}
    for name in ("instrument", "source", *dataset.own):
        numbers, counts = np.unique(dataset.column(name), return_counts=True)
        known = [f"{words[name][i]} ({count:,})" for i, count in zip(numbers, counts, strict=True) if i >= 0]
        if known:
            yield f"{name}: {some(known)}"
    pitch, velocity = dataset.column("pitch"), dataset.column("velocity")
    known_pitch = pitch[pitch >= 0]
    if not len(known_pitch):
        yield "pitch: unknown"
    else:
        low, high = (int(x) for x in (known_pitch.min(), known_pitch.max()))
        without = f", {len(pitch) - len(known_pitch):,} without one" if len(known_pitch) < len(pitch) else ""
        yield f"pitch: MIDI {low} to {high} ({note_name(low)} to {note_name(high)}){without}"
    if CONFIDENCE in dataset.columns and len(sure := dataset.column(CONFIDENCE)[dataset.column(CONFIDENCE) >= 0]):
        yield f"pitches estimated from the sound: {len(sure):,}, {sure.min()} to {sure.max()} % sure"
    if len(known_velocity := velocity[velocity >= 0]):
        yield f"velocity: {known_velocity.min()} to {known_velocity.max()}"


@main.command()
@click.argument("directory", type=click.Path(path_type=Path), required=False)
@click.option("--model", metavar="PATH|NAME", help="Run folder, model or packaged model; default: the packaged one.")
@click.option("--out", type=FOLDER, required=True, help="The new folder of tokens; must not exist.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: PyTorch's choice.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def tokens(
    directory: Path | None, model: str | None, out: Path, device: str, threads: int | None, as_json: bool
) -> None:
    """Make the tokens of the notes of a dataset with a model's tokenizer; without DIRECTORY, of the built-in notes.

    The folder holds tokens.safetensors and tokens.json, with names and labels. mars-train var and mars-generate take it
    as --tokens.
    """
    with user_errors():
        from mars.cli.console import print_json, result
        from mars.data import open_dataset
        from mars.model import load
        from mars.runtime import set_threads
        from mars.train.tokens import write_tokens

        set_threads(threads)
        loaded, dataset = load(model, device), open_dataset(directory)
        with _progress("Tokens") as progress:
            write_tokens(loaded, dataset, out, progress)
        count = loaded.config.tokenizer.tokens
        if as_json:
            print_json({"folder": str(out), "notes": len(dataset), "tokens": count})
        else:
            result(f"{printable(str(out))}: {len(dataset):,} notes of {count:,} tokens")


def _report(dataset: Dataset, path: Path, as_json: bool) -> None:
    """What was packed."""
    from mars.cli.console import print_json
    from mars.cli.options import quiet
    from mars.data.summary import summary

    if as_json:
        print_json(summary(dataset, path))
    elif not quiet():
        _say(summary(dataset, path))


def _say(known: dict[str, Any]) -> None:
    """What a dataset holds, what was done to its notes, and what was left out."""
    from mars.data.decode import CHANGES

    splits = ", ".join(f"{count:,} {split}" for split, count in known["splits"].items())
    name = printable(known["path"] or "built-in notes")
    click.echo(f"{name}: {known['notes']:,} notes of {known['instruments']:,} instruments ({splits})")
    if known["held_out"]:
        click.echo(f"held out: {printable(known['held_out'])}")
    for change, count in known["changes"].items():
        meaning = CHANGES[change].format(seconds=known["seconds"], rate=known["sample_rate"])
        click.echo(f"{count:,} {meaning}")
    if reasons := known["left_out"]:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        see = Path(known["path"]) / "bad_files.jsonl"
        click.echo(f"left out: {sum(reasons.values()):,} ({printable(listed)}); see {printable(str(see))}")
    if known["ignored"]:
        others = ", ".join(f"{count:,} {suffix}" for suffix, count in known["ignored"].items())
        click.echo(f"other files, not read: {printable(others)}")


if __name__ == "__main__":
    main()
