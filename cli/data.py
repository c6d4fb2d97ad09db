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
_LINE_EVERY = 30.0  # s between lines where there is no terminal


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (notes done, notes expected): a bar on a terminal, else a line now and then."""
    from mars import terminal

    with terminal.progress(terminal.console(), unit="notes", line_every=_LINE_EVERY) as tell:
        yield lambda done, total: tell(label, done, total)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Pack notes into a dataset to train on."""


def _pitches(_: click.Context, __: click.Parameter, value: str) -> tuple[int, int]:
    low, dash, high = value.partition("-")
    if not (dash and low.isdigit() and high.isdigit() and int(low) <= int(high) <= 127):
        raise click.BadParameter(f"want LOW-HIGH with 0 <= LOW <= HIGH <= 127, got {value!r}")
    return int(low), int(high)


def _packing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return the options that every reader has."""
    out = click.option("--out", type=FOLDER, required=True, help="The new dataset; must not exist.")
    allow = click.option(
        "--allow-bad", type=click.FloatRange(0, 1), default=0.01, show_default=True,
        help="Go on if at most this fraction of the files is bad; else exit with 3.",
    )  # fmt: skip
    return out(allow(command))


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
def nsynth(paths: tuple[Path, ...], out: Path, **options: Any) -> None:
    """Pack NSynth: folders or .tar.gz archives with examples.json and audio/*.wav, several if you like."""
    with user_errors():
        from mars.data.nsynth import pack_nsynth

        with _progress("Packing") as progress:
            dataset = pack_nsynth(paths, out, progress=progress, **options)
        _report(dataset, out)


@main.command()
@click.argument("directory", type=click.Path(exists=True, path_type=Path))
@_packing
@_holding_out
@click.option(
    "--csv",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Labels: the column file and any of pitch, velocity, family, source, instrument.",
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
@click.option("--licence", default="unknown", show_default=True, help="Of the audio; is kept.")
def folder(directory: Path, out: Path, **options: Any) -> None:
    """Pack a folder of sound files: WAV, FLAC, OGG, Opus, MP3, AIFF and, where FFmpeg is installed, others."""
    with user_errors():
        from mars.data.folder import pack_folder

        with _progress("Packing") as progress:
            dataset = pack_folder(directory, out, progress=progress, **options)
        _report(dataset, out)


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_packing
@_holding_out
@click.option("--notes", type=click.IntRange(1), help="How many, spread evenly.  [default: all there are]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of notes.")
@click.option("--pitches", default="21-108", show_default=True, callback=_pitches, help="Lowest and highest MIDI note.")
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True)
@click.option("--licence", default="unknown", show_default=True, help="Of the soundfont; is kept.")
def soundfont(file: Path, out: Path, **options: Any) -> None:
    """Render notes from an SF2 or SF3 soundfont."""
    with user_errors():
        from mars.data.soundfont import pack_soundfont

        with _progress("Rendering") as progress:
            dataset = pack_soundfont(file, out, progress=progress, **options)
        _report(dataset, out)


@main.command()
@click.argument("directory", type=click.Path(path_type=Path), required=False)
@click.option("--verify", is_flag=True, help="Also check every checksum.")
def info(directory: Path | None, verify: bool) -> None:
    """Say what a dataset holds; without DIRECTORY, the built-in notes."""
    with user_errors():
        from mars.data import SPLITS, Dataset, open_dataset
        from mars.labels import FAMILIES, some

        dataset = Dataset.open(directory, verify=verify) if directory else open_dataset(None)
        _report(dataset, directory)
        family, split, pitch = (dataset.column(name) for name in ("family", "split", "pitch"))
        click.echo(f"{dataset.samples} samples each at {dataset.sample_rate} Hz")
        click.echo("".join(f"{name:>12}" for name in ("family", *SPLITS)))
        for i, name in [*enumerate(FAMILIES), (-1, "unknown")]:
            counts = [int(((family == i) & (split == j)).sum()) for j in range(len(SPLITS))]
            if sum(counts):
                click.echo(f"{name:>12}" + "".join(f"{count:>12,}" for count in counts))
        click.echo(f"instrument: {printable(some(dataset.instruments))}")
        known = pitch[pitch >= 0]
        click.echo(f"pitch: {f'MIDI {known.min()} to {known.max()}' if len(known) else 'unknown'}")
        shown = {key: value for key, value in dataset.origin.items() if isinstance(value, str | int)}
        click.echo(printable("origin: " + ", ".join(f"{key} {value}" for key, value in shown.items())))
        click.echo(f"fingerprint: {dataset.fingerprint}" + (" (every checksum is right)" if verify else ""))


def _report(dataset: Dataset, path: Path | None) -> None:
    """What a dataset holds, what was done to its notes, and what was left out."""
    from mars.data import SPLITS
    from mars.data.decode import CHANGES
    from mars.data.packed import left_out

    counts = (dataset.column("split") == i for i in range(len(SPLITS)))
    splits = ", ".join(f"{is_in.sum():,} {split}" for split, is_in in zip(SPLITS, counts, strict=True))
    name = path or "built-in notes"
    click.echo(f"{printable(str(name))}: {len(dataset):,} notes of {len(dataset.instruments):,} instruments ({splits})")
    packing = dataset.packing
    if packing.held_out:
        click.echo(f"held out: {printable(packing.held_out)}")
    for change, meaning in CHANGES.items():
        if count := packing.changes.get(change):
            seconds = dataset.samples / dataset.sample_rate
            click.echo(f"{count:,} {meaning.format(seconds=seconds, rate=dataset.sample_rate)}")
    if path is not None and (reasons := left_out(path)):
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        click.echo(f"left out: {reasons.total():,} ({printable(listed)}); see {path / 'bad_files.jsonl'}")
    if packing.ignored:
        others = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(packing.ignored.items()))
        click.echo(f"other files, not read: {printable(others)}")


if __name__ == "__main__":
    main()
