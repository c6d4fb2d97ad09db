"""mars-eval: evaluation, and the classifiers that it needs."""

from __future__ import annotations

import os
from pathlib import Path

import click

from mars.cli.errors import user_errors

FOLDER = click.Path(path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
CLASSIFIERS = Path("classifiers")  # where they go, unless MARS_WEIGHTS_DIR names a folder


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure how good notes are."""


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
    "--max-time", metavar="TIME", help="Stop (and write the best so far) after this long, e.g. 90s, 40m or 2h."
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
    max_time: str | None,
    device: str,
    threads: int | None,
) -> None:
    """Train a pitch or instrument classifier on a dataset's train split.

    It is judged on the valid split, whose instruments it has not heard, and the test split is never looked at. The
    same seed, device and number of threads give the same weights on a CPU.
    """
    with user_errors():
        import torch

        from mars.data import open_dataset
        from mars.evaluate import classifier
        from mars.runtime import pick_device
        from mars.train.start import parse_time

        if threads:
            torch.set_num_threads(threads)
        seconds, where = parse_time(max_time), pick_device(device)
        classifier.train(
            open_dataset(data),
            classifier.task_of(task),
            preset,
            out or _folder() / f"{task}-{preset}",
            seed=seed,
            epochs=epochs,
            max_time=seconds,
            device=where,
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
        from mars.evaluate import classifier

        files = {
            classifier.task_of(name): path for name, path in (("pitch", pitch), ("instrument", instrument)) if path
        }
        if not files:
            raise click.UsageError("give --pitch FILE, --instrument FILE or both")
        for source, directory in classifier.import_sony(files, out or _folder(), force=force).items():
            click.echo(f"{directory} from {source}")


def _folder() -> Path:
    return Path(os.environ.get("MARS_WEIGHTS_DIR", CLASSIFIERS))


if __name__ == "__main__":
    main()
