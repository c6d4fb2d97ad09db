"""mars-eval: the metrics of notes against real ones, and the classifiers that some of them need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mars.cli.errors import Group, user_errors
from mars.cli.options import Renamed, seconds
from mars.files import cache_folder
from mars.text import printable

if TYPE_CHECKING:
    from mars.evaluate.evaluation import Options, Result
    from mars.evaluate.extractor import Progress

FOLDER = click.Path(path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
STDOUT = Path("-")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def say(line: str) -> None:
    """`mars.cli.console.say`, without its import before there is something to say."""
    from mars.cli import console

    console.say(line)


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
    click.option("--classifiers", "--preset", "preset", cls=Renamed, type=click.Choice(["full", "sony", "tiny"]),
                 help="Of which kind, in $MARS_WEIGHTS_DIR or classifiers/; default: full, and sony for vinay2022. "
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
    click.option("--cache", type=FOLDER, default=lambda: cache_folder() / "features", metavar="DIR",
                 help="Folder for features; default: features/ in $MARS_CACHE_DIR, else in the user's cache."),
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
    JSON,
)  # fmt: skip


def _with(*groups: tuple[Callable[..., Any], ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the options of the groups."""

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
@click.option(
    "--json",
    "json_file",
    type=FOLDER,
    metavar="[OUT]",
    is_flag=False,
    flag_value=STDOUT,
    help="Print the report as JSON or, with OUT, write it to this file.",
)
@click.option("--html", type=FOLDER, metavar="OUT", help="Write it with pictures and sounds to this file.")  # fmt: skip
def run(real: Path, fake: Path, pairs: bool, json_file: Path | None, html: Path | None, **options: Any) -> None:
    """Score the notes in a folder against real ones.

    Without --pairs they are taken for newly generated ones: mel errors are those against the nearest real note.
    """
    with user_errors(), _progress() as progress:
        from mars import evaluate

        scoring, printed = _options(options), json_file == STDOUT
        result = evaluate.run(
            real, fake, scoring, pairs=pairs, json_file=None if printed else json_file, html_file=html, say=say,
            progress=progress,
        )  # fmt: skip
        _print(result, printed)


@main.command()
@_with(PRODUCING)
@click.option("-n", "n", type=click.IntRange(min=1), help="So many of the notes, drawn with the seed; default: all.")
@click.option(
    "--refine",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Steps by which the encoder's tokens are improved; 20 take a second a note.",
)
@_with(SCORING)
def reconstruct(out: Path | None, model: str | None, data: Path | None, n: int | None, iterations: int, refine: int,
                as_json: bool, **options: Any) -> None:  # fmt: skip
    """Encode and decode notes with a model's tokenizer, and score what comes out."""
    with user_errors(), _progress() as progress:
        from mars import evaluate

        scoring = _options(options)
        result = evaluate.reconstruct(
            out, scoring, model=model, data=data, n=n, iterations=iterations, refine=refine, begun=_begun, say=say,
            progress=progress,
        )  # fmt: skip
        _print(result, as_json)


@main.command()
@_with(PRODUCING)
@click.option("-n", "n", type=click.IntRange(min=1), default=4096, show_default=True, help="How many notes.")
@click.option("--cfg", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Guidance; 0: none.")
@click.option("--top-k", type=click.IntRange(min=1), default=900, show_default=True)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.96, show_default=True)
@_with(SCORING)
def generate(out: Path | None, model: str | None, data: Path | None, n: int, cfg: float, top_k: int, top_p: float,
             iterations: int, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Generate notes with the labels of real ones, and score them against these."""
    with user_errors(), _progress() as progress:
        from mars import evaluate

        scoring = _options(options)
        result = evaluate.generate(
            out, scoring, model=model, data=data, n=n, cfg=cfg, top_k=top_k, top_p=top_p, iterations=iterations,
            begun=_begun, say=say, progress=progress,
        )  # fmt: skip
        _print(result, as_json)


@main.command()
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="REPORT.json…")
@click.option(
    "--published", is_flag=True, help="Beside them the paper's Table 1, as published; for reports of profile vinay2022."
)
@JSON
def compare(reports: tuple[Path, ...], published: bool, as_json: bool) -> None:  # fmt: skip
    """Show the figures of reports side by side, and warn of what makes them hard to compare."""
    with user_errors():
        from mars.cli.console import console, print_json
        from mars.evaluate import report, table
        from mars.evaluate.published import TABLE_1

        files = dict.fromkeys(reports)
        if len(files) < 2 - published:
            wanted = "a report or more" if published else "two reports or more"
            raise click.UsageError(f"give {wanted}: the files that --json names")
        names = [file.name for file in files]
        found = {file.name if names.count(file.name) == 1 else str(file): report.read(file) for file in files}
        beside = TABLE_1 if published else ()
        if as_json:
            print_json(table.comparison(found, beside))
        else:
            table.print_comparison(found, console(stderr=False), console(), beside)


@main.command()
@click.option("--task", type=click.Choice(["pitch", "instrument"]), required=True, help="What it tells apart.")
@click.option("--data", type=FOLDER, help="Packed dataset (mars-data); default: the built-in notes.")
@click.option(
    "--classifier",
    "--preset",
    "preset",
    cls=Renamed,
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
        from mars.train import classifier as trainer

        set_threads(threads)
        trainer.train(
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
@click.option(
    "--pitch-network", "--pitch", "pitch", cls=Renamed, type=FILE, help="File of the published pitch network."
)
@click.option(
    "--instrument-network", "--instrument", "instrument", cls=Renamed, type=FILE,
    help="File of the published instrument network.",
)  # fmt: skip
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
            raise click.UsageError("give --pitch-network FILE, --instrument-network FILE or both")
        for source, directory in classifier.import_sony(files, out or classifier.folder(), force=force).items():
            click.echo(printable(f"{directory} from {source}"))


def _options(given: dict[str, Any]) -> Options:
    """Return the options of SCORING and SPLIT as the library takes them; the threads are set here."""
    from mars.evaluate import Options
    from mars.runtime import set_threads

    set_threads(given.pop("threads"))
    no_cache, order = given.pop("no_cache"), given.pop("label_order")
    return Options(**{**given, "cache": None if no_cache else given["cache"], "as_published": order == "as-published"})


def _begun(out: Path) -> None:
    say(f"notes: {out / 'notes'}; if interrupted, go on with --out {out}")


def _print(result: Result, as_json: bool) -> None:
    """Show the figures, and where they were written."""
    from mars.cli.console import console, print_json
    from mars.evaluate import report, table

    if as_json:
        print_json(report.document(result.report))
    else:
        table.print_report(result.report, console(stderr=False))
    for path in result.files:
        say(f"written: {path}")


@contextmanager
def _progress() -> Iterator[Progress]:
    """Yield a callback that shows a progress bar for each task, on a terminal."""
    from mars.cli.console import bars

    with bars() as tell:
        yield tell


if __name__ == "__main__":
    main()
