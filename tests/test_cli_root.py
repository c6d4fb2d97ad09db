"""`mars` and what all commands share: versions, help, quiet, JSON, completion, and names that mean one thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import mars
from mars.cli import data, evaluate, generate, train
from mars.cli.options import Renamed
from mars.cli.root import main
from mars.config import preset_names
from mars.labels import FAMILIES


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for word, inner in command.commands.items():
            yield from commands(inner, f"{name} {word}")


ALL = dict(commands(main, "mars"))


def run(*arguments: object, command: click.Command = main):
    return CliRunner().invoke(command, [str(a) for a in arguments])


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_a_version_and_an_explanation(name):
    words = name.split()[1:]
    told = run(*words, "--version")
    assert (told.exit_code, told.output) == (0, f"mars {mars.__version__}\n")
    helped = run(*words, "--help")
    assert helped.exit_code == 0
    assert "-q, --quiet" in helped.output
    assert ALL[name].help


def test_the_four_are_commands_of_mars():
    assert {"data", "train", "generate", "eval", "export"} == set(main.commands)
    for name, command in {"data": data, "train": train, "generate": generate, "eval": evaluate}.items():
        assert main.commands[name] is command.main


def test_an_option_means_one_thing():
    """The same name takes the same kind of value in every command that has it."""
    kinds: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, command in ALL.items():
        for option in command.params:
            if isinstance(option, click.Option):
                kind = "flag" if option.is_flag else option.type.name
                choices = ",".join(map(str, getattr(option.type, "choices", ())))
                for spelt in option.opts[:1] if isinstance(option, Renamed) else option.opts:
                    kinds[spelt][f"{kind} {choices}".strip()].append(name)
    told = {"--split", "--json", "--seed", "--pitch", "--instrument"}  # see docs/commands.md
    found = {spelt: dict(kinds) for spelt, kinds in kinds.items() if len(kinds) > 1 and spelt not in told}
    assert not found, f"{found}: one name, several kinds of value"


def test_presets_and_families_are_in_the_help():
    shown = " ".join(run("train", "tokenizer", "--help").output.split())
    for name in preset_names():
        assert name in shown
    shown = " ".join(run("generate", "--help").output.split())
    for name in FAMILIES:
        assert name in shown


@pytest.mark.parametrize(
    ("words", "old"),
    [(("eval", "run"), "--preset"), (("eval", "train-classifier"), "--preset"), (("train", "var"), "--profile"),
     (("eval", "import-sony"), "--pitch"), (("eval", "import-sony"), "--instrument")],
)  # fmt: skip
def test_older_names_are_taken_but_not_shown(words, old):
    command = ALL[" ".join(("mars", *words))]
    (option,) = [p for p in command.params if old in p.opts]
    assert isinstance(option, Renamed)
    context = click.Context(command)
    assert old not in option.get_help_record(context)[0].replace(option.opts[0], "").split()
    assert option.opts[0] in option.get_help_record(context)[0]


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_the_package_is_a_command(tmp_path):
    done = python("-m", "mars", "data", "info", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    known = json.loads(done.stdout)
    assert known["notes"] == sum(known["splits"].values()) == 242
    assert known["path"] is None
    assert sum(sum(counts.values()) for counts in known["families"].values()) == known["notes"]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [("mars-generate --family br", "brass"), ("mars-generate --cf", "--cfg"), ("mars-data so", "soundfont"),
     ("mars-train tokenizer --preset pa", "paper"), ("mars ex", "export")],
)  # fmt: skip
def test_a_shell_completes(line, wanted, tmp_path):
    words = line.split()
    script = Path(sysconfig.get_path("scripts")) / words[0]
    variables = {f"_{words[0].upper().replace('-', '_')}_COMPLETE": "bash_complete"}
    variables |= {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = python(str(script), cwd=tmp_path, **variables)
    assert wanted in [found.partition(",")[2] for found in done.stdout.splitlines()], done.stdout + done.stderr


def test_quiet_leaves_warnings_errors_and_what_was_asked_for(tmp_path):
    loud = run("generate", "-n", 1, "--cfg", 0, "--iterations", 1, "--out", tmp_path / "a")
    assert "1 notes in" in loud.stdout
    assert "if interrupted" in loud.stderr
    hushed = run("generate", "-n", 1, "--cfg", 0, "--iterations", 1, "--out", tmp_path / "b", "--quiet")
    assert (hushed.exit_code, hushed.stdout, hushed.stderr) == (0, "", "")
    made = run("generate", "-n", 1, "--cfg", 0, "--iterations", 1, "--out", tmp_path / "c", "--json", "-q")
    assert made.stderr == ""
    known = json.loads(made.stdout)
    assert (known["folder"], known["notes"], known["were_there"]) == (str(tmp_path / "c"), 1, 0)
    assert known["seconds"] > 0
    wrong = run("generate", "-q", "--out", tmp_path / "a", "--family", "kazoo")
    assert wrong.exit_code == 2
    assert "kazoo" in wrong.stderr
    before = run("--quiet", "data", "info")  # what was asked for
    assert "built-in notes: 242" in before.stdout


def test_quiet_holds_for_warnings_of_the_library_too():
    from mars.cli.console import console, say

    @click.command()
    @click.pass_context
    def command(context: click.Context) -> None:
        context.meta["mars.quiet"] = True
        made = console()
        made.print("step 1")
        made.print("warning: no `out`")
        say("notes: here")
        say("warning: one is silent")

    done = CliRunner().invoke(command)
    assert done.stderr.splitlines() == ["warning: no `out`", "warning: one is silent"]
    assert done.stdout == ""
