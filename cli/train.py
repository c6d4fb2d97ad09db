"""mars-train: both stages of training."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mars.cli import options as grammar
from mars.cli.errors import Group, user_errors
from mars.errors import ConfigError
from mars.text import printable

if TYPE_CHECKING:
    from mars.runs.stage import StageName

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS = (
    click.option(
        "--data", type=click.Path(path_type=Path), help="Packed dataset (mars-data); default: the built-in notes."
    ),
    click.option("--preset", default=None, help="Settings to start from; default: notes, or the tokenizer's for var."),
    click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting, e.g. train.steps=500."
    ),
    click.option("--out", type=click.Path(path_type=Path), help="Run folder; default: a new one under runs/."),
    click.option(
        "--resume",
        default="auto",
        callback=grammar.resume,
        metavar="auto|never|RUN",
        show_default=True,
        help="auto: go on if --out is a run; never: refuse; or the run folder to go on with.",
    ),
    click.option("--max-steps", type=click.IntRange(min=1), help="Stop (and save) after this step."),
    click.option(
        "--max-time",
        metavar="TIME",
        callback=grammar.seconds,
        help="Stop (and save) after this long, e.g. 90s, 40m or 2h.",
    ),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: PyTorch's choice."),
    click.option("--tensorboard", is_flag=True, help="Log to TensorBoard too, in the run folder."),
    click.option(
        "--profile",
        type=click.Path(path_type=Path, dir_okay=False),
        is_flag=False,
        flag_value=Path("profile.json"),
        help="Only show where a step's time goes, and write a trace; default: profile.json. Makes no run.",
    ),
    click.option("--plan", is_flag=True, help="Train nothing: print the memory, the FLOPs and the batch that fits."),
    click.option(
        "--memory",
        metavar="SIZE",
        callback=grammar.size,
        help="With --plan: of the device, e.g. 24GB or 80GiB; default: 32GB.",
    ),
    click.option("--json", "as_json", is_flag=True, help="With --plan: print JSON."),
)


def training_options(function: F) -> F:
    """Return the options that both stages share."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def planned(stage: StageName, options: dict[str, Any]) -> bool:
    """Print the plan if `--plan` was given, and return whether it was; its options are removed from `options`."""
    show_plan, memory, as_json = (options.pop(name) for name in ("plan", "memory", "as_json"))
    if not show_plan:
        if memory is not None or as_json:
            raise ConfigError(f"{'--json' if memory is None else '--memory'} goes with --plan")
        return False
    if options["device"] == "mps":
        raise ConfigError("--plan --device mps: only for cuda (which auto means here) and cpu")
    from mars.runtime import set_threads
    from mars.train import plan
    from mars.train.start import settings_of, words_of

    set_threads(options["threads"])
    used = ("preset", "overrides", "out", "resume", "tokenizer")
    settings = settings_of(stage, **{name: options[name] for name in used if name in options})
    device: plan.Device = "cpu" if options["device"] == "cpu" else "cuda"
    words = words_of(settings, options["data"]) if stage == "var" else {}
    result = plan.Planner(settings, stage, device, words=words).plan(32 * 10**9 if memory is None else memory)
    click.echo(json.dumps(dataclasses.asdict(result), indent=1) if as_json else plan.report(result, before="--set "))
    return True


def _train(stage: StageName, options: dict[str, Any]) -> None:
    began = time.monotonic()  # importing PyTorch counts too
    with user_errors():
        if planned(stage, options):
            return
        from mars.cli.console import console
        from mars.distributed import teardown
        from mars.train.start import train

        with teardown():
            train(
                stage,
                **options,
                began=began,
                next_command=lambda run: _following(stage, run, options["data"]),
                console=console(),
            )


def _following(stage: StageName, run: Path, data: Path | None) -> str:
    """Return the complete command to run after this training, to be copied."""
    if stage == "var":
        return shlex.join(["mars-generate", "-n", "64", "--model", str(run)])
    notes = [] if data is None else ["--data", str(data)]
    return shlex.join(["mars-train", "var", "--tokenizer", str(run), *notes])


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train a model: first the tokenizer, then the VAR transformer on its tokens."""


@main.command()
@training_options
def tokenizer(**options: Any) -> None:
    """Train the tokenizer: spectrograms to tokens and back."""
    _train("tokenizer", options)


@main.command()
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="Tokenizer run or model; default: the newest run under runs/, which must be of the same dataset.",
)
@click.option("--shard", is_flag=True, help="Under torchrun: spread the model over the processes (FSDP2).")
@training_options
def var(**options: Any) -> None:
    """Train the VAR transformer: tokens of each scale from those of the coarser ones."""
    _train("var", options)


@main.command("list")
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_runs(runs: tuple[Path, ...], as_json: bool) -> None:
    """Show runs side by side, newest first: run folders, or folders of them; default: runs/."""
    from mars.runs import compare

    with user_errors():
        summaries = compare.summaries(compare.find(runs or [p for p in (compare.RUNS,) if p.is_dir()]))
    if as_json:
        click.echo(json.dumps(summaries, indent=1))
    elif summaries:
        click.echo(compare.table(summaries))
    else:
        click.echo("no runs; train one: mars-train tokenizer", err=True)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Make the report of a run folder again: report.html."""
    with user_errors():
        from mars.runs.report import write

        click.echo(printable(str(write(run))))


if __name__ == "__main__":
    main()
