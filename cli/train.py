"""mars-train: both stages of training."""

from __future__ import annotations

import dataclasses
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
    click.option(
        "--preset",
        cls=grammar.Listed,
        known=grammar.presets,
        help="Settings to start from: {}; default: notes, or the tokenizer's for var.",
    ),
    click.option(
        "--config",
        "settings_file",
        metavar="FILE.toml",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Settings in place of the preset's, as --print-config prints them.",
    ),
    click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting, e.g. train.steps=500."
    ),
    click.option("--init", metavar="MODEL", help="Run, model or packaged model to start from; default: nothing."),
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
        "--trace",
        "--profile",
        "profile",
        cls=grammar.Renamed,
        metavar="[FILE]",
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
    click.option("--print-config", is_flag=True, help="Train nothing: print all settings, as --config takes them."),
    click.option("--json", "as_json", is_flag=True, help="Print the plan, or at the end the run, as JSON."),
)


def training_options(function: F) -> F:
    """Return the options that both stages share."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def shown(stage: StageName, options: dict[str, Any]) -> bool:
    """Print the plan or the settings if one was asked for, and return whether; removes their options."""
    show_plan, memory, show_settings = (options.pop(name) for name in ("plan", "memory", "print_config"))
    if memory is not None and not show_plan:
        raise ConfigError("--memory goes with --plan")
    if show_plan and show_settings:
        raise ConfigError("--plan and --print-config: give one of them")
    if not show_plan and not show_settings:
        return False
    if show_plan and options["device"] == "mps":
        raise ConfigError("--plan --device mps: only for cuda (which auto means here) and cpu")
    from mars import config
    from mars.cli.console import print_json
    from mars.runtime import set_threads
    from mars.train.start import settings_of, words_of

    set_threads(options["threads"])
    used = ("preset", "settings_file", "overrides", "out", "resume", "tokenizer", "init", "data")
    settings = settings_of(stage, **{name: options[name] for name in used if name in options})
    if show_settings:
        document = config.to_dict(settings)
        print_json(document) if options["as_json"] else click.echo(config.as_toml(settings), nl=False)
        return True
    from mars.train import plan

    device: plan.Device = "cpu" if options["device"] == "cpu" else "cuda"
    words = words_of(settings, options["data"]) if stage == "var" else {}
    result = plan.Planner(settings, stage, device, words=words).plan(32 * 10**9 if memory is None else memory)
    if options["as_json"]:
        print_json(dataclasses.asdict(result))
    else:
        click.echo(plan.report(result, before="--set "))
    return True


def _train(stage: StageName, options: dict[str, Any]) -> None:
    began = time.monotonic()  # importing PyTorch counts too
    with user_errors():
        if shown(stage, options):
            return
        from mars.cli.console import console, print_json
        from mars.runs import compare
        from mars.runs.distributed import teardown
        from mars.train.start import train

        as_json = options.pop("as_json")
        with teardown():
            run = train(
                stage,
                **options,
                began=began,
                next_command=lambda run: _next_command(stage, run, options["data"]),
                console=console(),
            )
            if as_json and options["profile"] is None:
                print_json(compare.summaries([run])[0])


def _next_command(stage: StageName, run: Path, data: Path | None) -> str:
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
@click.option(
    "--tokens",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The dataset's tokens, as mars-data tokens makes them; default: made now, and kept beside the runs.",
)
@click.option("--shard", is_flag=True, help="Under torchrun: spread the model over the processes (FSDP2).")
@training_options
def var(**options: Any) -> None:
    """Train the VAR transformer: tokens of each scale from those of the coarser ones."""
    _train("var", options)


@main.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--from", "base", default="notes", show_default=True, metavar="MODEL", help="Model to start from.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for everything; default: a new one under runs/.")
@click.option(
    "--time", "max_time", default="10m", show_default=True, callback=grammar.seconds, help="For all of it, e.g. 90s."
)
@click.option(
    "--csv",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Labels; see mars-data folder.",
)
@click.option(
    "--pitch",
    type=click.Choice(["estimate", "named"]),
    default="estimate",
    show_default=True,
    help="Where the names of files and the CSV say no pitch; see mars-data folder.",
)
@click.option(
    "--allow-bad",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Share of bad files to go on with.",
)
@click.option("--notes", type=click.IntRange(min=1), default=16, show_default=True, help="New ones made at the end.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: PyTorch's choice.")
def finetune(source: Path, **options: Any) -> None:
    """Let a trained model learn your own sounds: a folder of them, or a packed dataset.

    Sub-folders are instruments. Both stages are trained, each until the sounds that are held out get no better, and
    new notes are made. The same command with the same --out goes on where an interrupted one was.
    """
    began = time.monotonic()
    with user_errors():
        from mars.cli.console import console
        from mars.runs.distributed import teardown
        from mars.train.finetune import finetune

        with teardown():
            finetune(
                source,
                **options,
                began=began,
                next_command=lambda out: shlex.join(["mars-generate", "-n", "64", "--model", str(out)]),
                console=console(),
            )


@main.command("list")
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_runs(runs: tuple[Path, ...], as_json: bool) -> None:
    """Show runs side by side, newest first: run folders, or folders of them; default: runs/."""
    from mars.runs import compare

    with user_errors():
        summaries = compare.summaries(compare.find(runs or [p for p in (compare.RUNS,) if p.is_dir()]))
        from mars.cli.console import print_json, say

        if as_json:
            print_json(summaries)
        elif summaries:
            click.echo(compare.table(summaries))
        else:
            say("no runs; train one: mars-train tokenizer")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Make the report of a run folder again: report.html."""
    with user_errors():
        from mars.runs.report import write

        click.echo(printable(str(write(run))))


if __name__ == "__main__":
    main()
