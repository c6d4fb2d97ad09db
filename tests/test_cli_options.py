"""How a command line writes times, sizes and runs, and which option it shows for an argument of the library."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import click
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from mars.cli import data, evaluate, generate, instrument, options, train
from mars.cli.console import CommandConsole
from mars.errors import ConfigError, DataError
from mars.train.start import settings_of

ROOT = Path(__file__).parents[1]
MAINS = {
    "mars-train": train.main,
    "mars-data": data.main,
    "mars-eval": evaluate.main,
    "mars-generate": generate.main,
    "mars-instrument": instrument.main,
}
COMMANDS = {
    f"{name} {part}".strip(): command
    for name, main in MAINS.items()
    for part, command in (main.commands.items() if isinstance(main, click.Group) else [("", main)])
}


def value(callback, text):
    return callback(None, None, text)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("40m", 2400), ("1.5h", 5400), ("7", 7), (None, None)])
def test_times(text, seconds):
    assert value(options.seconds, text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "-1m", "m", "1d", "nan", "inf", "9e999h"])
def test_wrong_times(text):
    with pytest.raises(click.BadParameter, match="want a time such as 90s, 40m or 2h, got"):
        value(options.seconds, text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("32GB", 32 * 10**9), ("24GiB", 24 << 30), ("1.5 TB", 15 * 10**11), ("512MiB", 512 << 20), (None, None)],
)
def test_sizes(text, size):
    assert value(options.size, text) == size


@pytest.mark.parametrize("text", ["", "32", "32 gb", "GB", "-1GB", "0GB", "1e3GB", "32GBs", "9" * 20 + "TB"])
def test_wrong_sizes(text):
    with pytest.raises(click.BadParameter, match="want a size such as 32GB or 24GiB, got"):
        value(options.size, text)


def test_the_run_to_go_on_with_is_a_path_or_a_word():
    assert [value(options.resume, text) for text in ("auto", "never", "runs/auto")] == [
        "auto",
        "never",
        Path("runs/auto"),
    ]


@pytest.mark.parametrize(
    "arguments", [("tokenizer", "--max-time", "soon"), ("tokenizer", "--plan", "--memory", "much")]
)
def test_a_value_of_another_kind_names_its_option(arguments):
    result = CliRunner().invoke(train.main, arguments)
    assert result.exit_code == 2
    assert f"'{arguments[-2]}': want a " in result.output


def test_an_argument_is_shown_as_the_option_of_the_command_at_hand():
    text = "`out` and `max_time`, `pitch`, `mars-train var`, `nothing` and `Out`"
    assert options.in_options(text) == text  # in Python it is an argument
    typed = "mars-train var --tokenizer MODEL"
    for main, out, pitch in ((train.main.commands["var"], "--out and --max-time", "--pitch-classifier"),
                             (generate.main, "--out and `max_time`", "--pitch")):  # fmt: skip
        with click.Context(main):
            assert options.in_options(text) == f"{out}, {pitch}, {typed}, `nothing` and `Out`"


def test_what_the_console_of_a_command_prints_names_options_too(tmp_path):
    with (tmp_path / "said").open("w") as file, click.Context(train.main.commands["var"]):
        CommandConsole(file=file, soft_wrap=True).print("newest; `tokenizer` names [b]another[/b]")
    assert (tmp_path / "said").read_text() == "newest; --tokenizer names [b]another[/b]\n"


@pytest.mark.parametrize("name", [name for name in options.TYPED if name.startswith("mars-")])
def test_a_command_that_is_advised_can_be_typed(name):
    typed = options.TYPED[name]
    assert typed.startswith(f"{name} ")
    known = {opt for param in COMMANDS[name].params for opt in param.opts}
    assert set(re.findall("--[a-z-]+", typed)) <= known


def messages():
    """Every string of the library that is not a docstring, with its place."""
    for path in sorted((ROOT / "mars").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value


def test_what_a_message_names_in_backquotes_is_an_option_or_a_command():
    known = {param.name for command in COMMANDS.values() for param in command.params} | options.TYPED.keys()
    named = [(place, name) for place, text in messages() for name in re.findall("`([a-z][a-z_ -]*)`", text)]
    assert len(named) > 30
    unknown = [
        f"{place} names `{name}`: no command has that option; mend the name, or say in TYPED of cli/options.py what "
        "a user types for it"
        for place, name in named
        if name not in known and place.split(":")[0] != "mars/data/soundfont.py"
    ]
    assert unknown == []


def test_python_is_told_of_arguments():
    with pytest.raises(ConfigError, match=r"^`resume` b: not a run folder"):
        settings_of("var", out=Path("a"), resume=Path("b"))


def test_commands_are_told_of_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sounds").mkdir()
    soundfile.write("sounds/a.wav", np.zeros(16), 16_000)  # too short
    for main, arguments, raised in (
        (data.main, "folder sounds --out x", "allow a larger fraction with --allow-bad"),
        (data.main, "info absent", "pack notes into it first: mars-data folder PATH --out DIR"),
        (train.main, "var --device cpu --shard", "--shard: there is one process"),
        (train.main, "tokenizer --device cpu --resume absent", "--resume absent: not a run folder"),
        (train.main, "tokenizer --device cpu --out sounds --set train.steps=1", "--out sounds exists and is not a run"),
        (
            train.main,
            "var --device cpu --tokenizer notes --set audio.samples=2000",
            "--set audio.…: the trained",
        ),
        (train.main, "var --device cpu", "(mars-train tokenizer --data DIR) or name it with --tokenizer"),
        (evaluate.main, "train-classifier --task pitch --preset tiny --out sounds", "--out sounds exists"),
        (evaluate.main, "run --real sounds --fake sounds --metrics mse", "allow the fraction of them with --allow-bad"),
    ):
        result = CliRunner().invoke(main, arguments.split())
        assert result.exit_code in (2, 3)
        assert raised in " ".join(result.output.split())
        assert "`" not in result.output


def test_a_report_on_a_terminal_names_the_option_that_a_metric_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("real", "fake"):
        Path(folder).mkdir()
        for i in range(2):
            noise = np.random.default_rng(i).uniform(-0.5, 0.5, 64_000)
            soundfile.write(f"{folder}/{i}.wav", noise, 16_000)
    arguments = "run --real real --fake fake --preset tiny --no-baselines --no-cache --device cpu"
    result = CliRunner().invoke(evaluate.main, arguments.split())
    assert result.exit_code == 0, result.output
    assert "want the training notes (--train)" in result.output


def test_a_dataset_that_is_none_is_an_argument_in_python():
    from mars.data import open_dataset

    with pytest.raises(DataError, match="`mars-data folder`"):
        open_dataset("absent")
