"""mars-eval: the metrics of notes against real ones, and the classifiers that some of them need."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mars.cli.errors import Group, user_errors
from mars.cli.options import seconds
from mars.text import printable

if TYPE_CHECKING:
    from mars.evaluate.report import Mode
    from mars.evaluate.run import Progress
    from mars.evaluate.sets import NoteSet
    from mars.model import Model

FOLDER = click.Path(path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
CACHE = Path("features")


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",")) if value else ()


SPLIT = click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    default="test",
    show_default=True,
    help="Of a packed dataset.",
)
SCORING = (
    click.option("--profile", type=click.Choice(["standard", "vinay2022"]), default="standard", show_default=True,
                 help="vinay2022: the statistics behind the published baselines, their flaws included."),
    click.option("--metrics", callback=_names, metavar="A,B,…",
                 help="These must be computed, and no others; default: all that can be."),
    click.option("--seed", type=click.IntRange(min=0), default=2020, show_default=True, help="Of all that is drawn."),
    click.option("--bins", type=click.IntRange(min=2), default=100, show_default=True, help="k of NDB/k."),
    click.option("--train", type=FOLDER, metavar="DIR",
                 help="Notes that the model learned from (folder, or packed dataset): NDB's bins, search for copies."),
    click.option("--preset", type=click.Choice(["full", "sony", "tiny"]),
                 help="Classifiers, in $MARS_WEIGHTS_DIR or classifiers/; default: full, and sony for vinay2022. "
                 "tiny comes with mars."),
    click.option("--pitch-classifier", type=FOLDER, metavar="DIR", help="Another pitch classifier."),
    click.option("--instrument-classifier", type=FOLDER, metavar="DIR", help="Another instrument classifier."),
    click.option("--vggish", type=FILE, help="VGGish's weights; default: those in $MARS_WEIGHTS_DIR."),
    click.option("--crepe", type=click.Choice(["tiny", "full"]), default="tiny", show_default=True),
    click.option("--label-order", type=click.Choice(["correct", "as-published"]), default="correct", show_default=True,
                 help="vinay2022: as-published swaps the two classifiers, as the published constants do."),
    click.option("--force", is_flag=True, help="Take classifiers that are less accurate than their gate asks."),
    click.option("--baselines/--no-baselines", default=True, show_default=True,
                 help="Rows for real notes against real ones, Griffin-Lim alone, and low-passed 8-bit notes."),
    click.option("--allow-bad", type=click.FloatRange(0, 1), default=0.0, show_default=True, metavar="FRACTION",
                 help="Files that may be left out of a folder, and are listed in the report."),
    click.option("--cache", type=FOLDER, default=CACHE, show_default=True, help="Folder for features."),
    click.option("--no-cache", is_flag=True, help="Keep no features."),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: PyTorch's choice."),
)  # fmt: skip
PRODUCING = (
    click.option("--model", metavar="PATH|NAME", help="Run folder or model; default: the packaged one."),
    click.option("--data", type=FOLDER, metavar="DIR",
                 help="Real notes (folder, or packed dataset); default: the built-in ones."),
    SPLIT,
    click.option("--iterations", type=click.IntRange(min=0), default=32, show_default=True, help="Of Griffin-Lim."),
    click.option("--out", type=FOLDER,
                 help="For notes/, report.json and report.html (report-vinay2022 of that profile); default: a new "
                 "folder in evaluations/. An interrupted one goes on where it was."),
)  # fmt: skip


def _with(*groups: tuple[Callable[..., Any], ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of the groups."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return decorate


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure how good notes are."""


@main.command()
@click.option("--real", type=FOLDER, required=True, metavar="DIR", help="Real notes (folder, or packed dataset).")
@click.option("--fake", type=FOLDER, required=True, metavar="DIR", help="Notes to evaluate.")
@SPLIT
@click.option("--pairs", is_flag=True, help="The notes are reconstructions of the real ones, and pair up by name.")
@_with(SCORING)
@click.option("--json", "json_file", type=FOLDER, metavar="OUT", help="Write the report to this file.")
@click.option("--html", type=FOLDER, metavar="OUT", help="Write it with pictures and sounds to this file.")
def run(real: Path, fake: Path, split: str, pairs: bool, json_file: Path | None, html: Path | None,
        **options: Any) -> None:  # fmt: skip
    """Score the notes in a folder against real ones.

    Without --pairs they are taken for newly generated ones: mel errors are those against the nearest real note.
    """
    with user_errors(), _progress() as progress:
        from mars.evaluate.sets import can_pair

        prepared = _prepare("reconstruction" if pairs else "generation", options, progress)
        notes = _open(real, split, options["allow_bad"], progress), _open(fake, split, options["allow_bad"], progress)
        if not pairs and can_pair(*notes):
            click.echo(
                f"note: every note of {fake} has the name of a real one; if they are reconstructions of these, "
                "say so with --pairs: mel errors are then those against the original, not the nearest real note",
                err=True,
            )
        _writable(json_file, html)
        _score(*notes, prepared, options, progress, json_file, html)


@main.command()
@_with(PRODUCING)
@click.option("-n", "n", type=click.IntRange(min=1), help="So many of the notes, drawn with the seed; default: all.")
@_with(SCORING)
def reconstruct(n: int | None, **options: Any) -> None:
    """Encode and decode notes with a model's tokenizer, and score what comes out."""

    def make(model: Model, real: NoteSet, folder: Path, progress: Progress) -> dict[str, Any]:
        from mars.evaluate import produce

        settings = {name: options[name] for name in ("iterations", "seed")}
        return produce.reconstruct(model, real, folder, **settings, progress=partial(progress, "reconstruct"))

    _produce("reconstruction", make, options, drawn=n)


@main.command()
@_with(PRODUCING)
@click.option("-n", "n", type=click.IntRange(min=1), default=4096, show_default=True, help="How many notes.")
@click.option("--cfg", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Guidance; 0: none.")
@click.option("--top-k", type=click.IntRange(min=1), default=900, show_default=True)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.96, show_default=True)
@_with(SCORING)
def generate(n: int, **options: Any) -> None:
    """Generate notes with the labels of real ones, and score them against these."""

    def make(model: Model, real: NoteSet, folder: Path, progress: Progress) -> dict[str, Any]:
        from mars.evaluate import produce

        settings = {name: options[name] for name in ("iterations", "seed", "cfg", "top_k", "top_p")}
        return produce.generate_like(model, real, n, folder, **settings, progress=partial(progress, "generate"))

    _produce("generation", make, options)


@main.command()
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="REPORT.json…")
def compare(reports: tuple[Path, ...]) -> None:
    """Show the figures of reports side by side, and warn of what makes them hard to compare."""
    with user_errors():
        from mars import terminal
        from mars.evaluate import report, table

        files = dict.fromkeys(reports)
        if len(files) < 2:
            raise click.UsageError("give two reports or more: the files that --json names")
        names = [file.name for file in files]
        found = {file.name if names.count(file.name) == 1 else str(file): report.read(file) for file in files}
        table.print_comparison(found, terminal.console(stderr=False), terminal.console())


@main.command()
@click.option("--task", type=click.Choice(["pitch", "instrument"]), required=True, help="What it tells apart.")
@click.option("--data", type=FOLDER, help="Packed dataset (mars-data); default: the built-in notes.")
@click.option(
    "--preset",
    type=click.Choice(["full", "sony", "tiny"]),
    default="full",
    show_default=True,
    help="full: Inception-v3 on the whole note; sony: as published; tiny: four convolutions.",
)
@click.option(
    "--out", type=FOLDER, help="The new directory; default: TASK-PRESET in $MARS_WEIGHTS_DIR or classifiers/."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), help="At most; default: the preset's.")
@click.option(
    "--max-time",
    metavar="TIME",
    callback=seconds,
    help="Stop (and write the best so far) after this long, e.g. 90s, 40m or 2h.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: PyTorch's choice.")
def train_classifier(
    task: str,
    data: Path | None,
    preset: str,
    out: Path | None,
    seed: int,
    epochs: int | None,
    max_time: float | None,
    device: str,
    threads: int | None,
) -> None:
    """Train a pitch or instrument classifier on a dataset's train split.

    It is judged on the valid split, whose instruments it has not heard, and the test split is never looked at. The
    same seed, device and number of threads give the same weights on a CPU.
    """
    with user_errors():
        from mars.cli.console import console
        from mars.data import open_dataset
        from mars.evaluate.embedders import classifier
        from mars.runtime import pick_device, set_threads

        set_threads(threads)
        classifier.train(
            open_dataset(data),
            classifier.task_of(task),
            preset,
            out or classifier.folder() / f"{task}-{preset}",
            seed=seed,
            epochs=epochs,
            max_time=max_time,
            device=pick_device(device),
            console=console(),
        )


@main.command()
@click.option("--pitch", type=FILE, help="File of the published pitch network.")
@click.option("--instrument", type=FILE, help="File of the published instrument network.")
@click.option("--out", type=FOLDER, help="Where pitch-sony and instrument-sony go; default: as for train-classifier.")
@click.option(
    "--force", is_flag=True, help="Take files that are not the published ones for what their classes suggest."
)
def import_sony(pitch: Path | None, instrument: Path | None, out: Path | None, force: bool) -> None:
    """Convert the networks that Nistal et al. published in 2020, for figures to set beside theirs.

    Which file is which their content decides: the names and the constants of the published code are swapped.
    """
    with user_errors():
        from mars.evaluate.embedders import classifier

        files = {
            classifier.task_of(name): path for name, path in (("pitch", pitch), ("instrument", instrument)) if path
        }
        if not files:
            raise click.UsageError("give --pitch FILE, --instrument FILE or both")
        for source, directory in classifier.import_sony(files, out or classifier.folder(), force=force).items():
            click.echo(printable(f"{directory} from {source}"))


def _produce(
    mode: Mode,
    make: Callable[[Model, NoteSet, Path, Progress], dict[str, Any]],
    options: dict[str, Any],
    *,
    drawn: int | None = None,
) -> None:
    """Let `make` make notes in a folder with a model, from real notes (None: all, or so many of them); score them."""
    with user_errors(), _progress() as progress:
        prepared = _prepare(mode, options, progress)
        from mars.model import load

        data, split, allow_bad = options["data"], options["split"], options["allow_bad"]
        real = _open(data, split, allow_bad, progress)
        if drawn is not None:
            real = real.shuffled(options["seed"]).subset(range(min(drawn, len(real))))
        model = load(options["model"], options["device"])
        _tell_of_other_notes(model, "tokenizer" if mode == "reconstruction" else "var", options["model"], data)
        out = _begin(options["out"], data)
        produced = make(model, real, out / "notes", progress)
        fake = _open(out / "notes", split, allow_bad, progress)
        files = _reports(out, options["profile"])
        _score(real, fake, prepared, options, progress, *files, produced=produced, audio=model.config.audio)


def _prepare(mode: Mode, options: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """What `evaluate` takes beside the two sets, checked before the hours that these may take.

    Sets the threads, and the device in place of its name.
    """
    from mars.errors import ConfigError
    from mars.evaluate.embedders import roles as embedders
    from mars.evaluate.embedders.classifier import Classifier
    from mars.evaluate.run import Settings, check
    from mars.runtime import pick_device, set_threads

    set_threads(options["threads"])
    options["device"] = pick_device(options["device"])
    settings = Settings(
        profile=options["profile"],
        mode=mode,
        metrics=options["metrics"],
        seed=options["seed"],
        bins=options["bins"],
        as_published=options["label_order"] == "as-published",
    )
    networks = embedders.load(
        options["preset"] or ("sony" if settings.profile == "vinay2022" else "full"),
        roles=settings.roles,
        pitch=options["pitch_classifier"],
        instrument=options["instrument_classifier"],
        vggish_weights=options["vggish"],
        framing="google" if settings.profile == "standard" else "google-16-bit",
        crepe_size=options["crepe"],
        device=options["device"],
        force=options["force"],
    )
    for network in networks.values():
        if isinstance(network, Classifier) and (below := network.below_gate):
            click.echo(printable(f"warning: {network.id}: {below}; taken because of --force"), err=True)
    if not options["no_cache"] and options["cache"].exists() and not options["cache"].is_dir():
        raise ConfigError(f"--cache {options['cache']} is not a folder; name another place, or use --no-cache")
    train = options["train"] and _open(options["train"], "train", options["allow_bad"], progress)
    check(settings, networks, train)
    return {"settings": settings, "embedders": networks, "train": train}


def _open(path: Path | None, split: str, allow_bad: float, progress: Progress) -> NoteSet:
    from mars.evaluate.sets import open_notes

    told = f"read {'the built-in notes' if path is None else path}"
    return open_notes(path, split=split, allow_bad=allow_bad, progress=lambda done, of: progress(told, done, of))


def _tell_of_other_notes(model: Model, stage: str, name: str | None, data: Path | None) -> None:
    """Warn where the built-in notes are taken for want of others, and the model is known to come from others."""
    from mars.data import open_dataset

    if data is None and model.data.get(stage, built_in := open_dataset(None).fingerprint) != built_in:
        click.echo(
            f"warning: {name} was not trained on the built-in notes, with which it is compared now; "
            "name its own real notes with --data DIR",
            err=True,
        )


def _begin(out: Path | None, data: Path | None) -> Path:
    """The folder of notes to be made and of their reports, which can be written and is told."""
    from mars.errors import ConfigError
    from mars.files import new_folder

    place = out or Path("evaluations")
    if data is not None and place.resolve().is_relative_to(data.resolve()):
        raise ConfigError(f"--out {place} is inside --data, whose notes the new ones would join; name another folder")
    out = out or new_folder(place, time.strftime("%Y%m%d-%H%M%S"))
    _writable(*_reports(out, "standard"))
    click.echo(printable(f"notes: {out / 'notes'}; if interrupted, go on with --out {out}"), err=True)
    return out


def _reports(out: Path, profile: str) -> tuple[Path, Path]:
    """A profile has reports of its own, beside those of the other."""
    stem = "report" if profile == "standard" else f"report-{profile}"
    return out / f"{stem}.json", out / f"{stem}.html"


def _writable(*files: Path | None) -> None:
    """See that files can be written, before hours are spent on what goes into them."""
    from mars.errors import ConfigError, DiskError
    from mars.files import probe

    for file in filter(None, files):
        if file.is_dir():
            raise ConfigError(f"{file} is a folder; name a file")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            probe(file.parent)
        except OSError as error:
            raise DiskError(f"{file.parent} cannot be written ({error.strerror}); name another place") from None


def _score(
    real: NoteSet,
    fake: NoteSet,
    prepared: Mapping[str, Any],
    options: Mapping[str, Any],
    progress: Progress,
    json_file: Path | None,
    html: Path | None,
    **context: Any,
) -> None:
    """Evaluate, print, write."""
    from mars.cli.console import console
    from mars.evaluate import page, report, table
    from mars.evaluate.run import evaluate

    with tempfile.TemporaryDirectory() as temporary:
        found = evaluate(
            real,
            fake,
            **prepared,
            cache=Path(temporary) if options["no_cache"] else options["cache"],
            baselines=options["baselines"],
            progress=progress,
            device=str(options["device"]),
            **context,
        )
    if json_file is not None:
        report.write(json_file, found.report)
    if html is not None:
        page.write(html, found.report, [page.Pair(title, sounds) for title, sounds in found.shown])
    table.print_report(found.report, console(stderr=False))
    for path in (json_file, html):
        if path is not None:
            click.echo(printable(f"written: {path}"), err=True)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar for each thing that is done, on a terminal."""
    from mars import terminal

    with terminal.progress(terminal.console()) as tell:
        yield tell


if __name__ == "__main__":
    main()
