"""mars: all commands as one, and the export of a trained model."""

from __future__ import annotations

from pathlib import Path

import click

from mars.cli import data, evaluate, generate, instrument, train
from mars.cli.errors import Group, user_errors
from mars.text import printable


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Next-scale autoregressive sound generation on spectrograms.

    Each command is one of its own too: mars-data, mars-train, mars-generate, mars-instrument, mars-eval.
    """


main.add_command(data.main, "data")
main.add_command(train.main, "train")
main.add_command(generate.main, "generate")
main.add_command(instrument.main, "instrument")
main.add_command(evaluate.main, "eval")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new folder; must not exist.")
@click.option("--last", is_flag=True, help="The last step's weights, where others were better on held-out notes.")
@click.option("--half", is_flag=True, help="Weights in float16, which halves the files.")
@click.option("--licence", help="Of the model: stated in its card, e.g. apache-2.0 or cc-by-4.0.")
@click.option("--name", help="Of the model, in its card; default: that of the folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the files as JSON.")
def export(run: Path, out: Path, last: bool, half: bool, licence: str | None, name: str | None, as_json: bool) -> None:
    """Write the model of a run to a folder of its own, with a card, and nothing else: to keep, or to hand on.

    The card says what the model was trained on and how, the licence of these notes, its figures, and how it is used.
    """
    with user_errors():
        from mars.cli.console import print_json
        from mars.runs.export import export as exported

        files = exported(run, out, last=last, half=half, licence=licence, name=name)
        if as_json:
            print_json({"folder": str(out), "files": {file.name: file.stat().st_size for file in files}})
        else:
            for file in files:
                click.echo(f"{printable(str(file))}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
