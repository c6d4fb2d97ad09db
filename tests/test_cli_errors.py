"""What a user sees of an error, in every command."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import click
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from mars import cli
from mars.cli import data, evaluate, generate, train
from mars.cli.errors import Command, Failure, Group, user_errors
from mars.errors import DataError

HOSTILE = "\x1b]0;owned\x07\x1b[31m\u202ename\n"
MAINS = {"data": data.main, "evaluate": evaluate.main, "generate": generate.main, "train": train.main}


def run(error: BaseException):
    @click.command(cls=Command)
    def command() -> None:
        raise error

    return CliRunner().invoke(command)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("data", [HOSTILE]),
        ("data", ["info", HOSTILE]),
        ("data", ["info", f"--{HOSTILE}"]),
        ("data", ["folder", HOSTILE, "--out", "x"]),
        ("data", ["nsynth", ".", "--out", "x", "--split", HOSTILE]),
        ("evaluate", ["compare", HOSTILE, "x"]),
        ("evaluate", ["run", "--real", HOSTILE, "--fake", "x", "--preset", HOSTILE]),
        ("generate", ["--model", HOSTILE, "--out", "x"]),
        ("generate", [HOSTILE]),
        ("train", ["report", HOSTILE]),
        ("train", ["tokenizer", "--preset", HOSTILE]),
        ("train", ["tokenizer", "--plan", "--preset", HOSTILE]),
        ("train", ["tokenizer", "--plan", "--set", HOSTILE]),
    ],
)
def test_names_in_errors_do_nothing_to_the_terminal(name, arguments):
    done = CliRunner().invoke(MAINS[name], arguments)
    assert done.exit_code == 2
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert r"\x1b[31m\u202ename" in line
    assert all(character.isprintable() for character in done.output.replace("\n", ""))


def test_names_told_by_info_do_nothing_to_the_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, out = HOSTILE.replace("\n", "").replace("/", ""), "out\x1b[2J"
    (tmp_path / folder).mkdir()
    soundfile.write(tmp_path / folder / "a.wav", 0.5 * np.sin(0.1 * np.arange(16_000)), 16_000)
    packed = CliRunner().invoke(data.main, ["folder", folder, "--out", out, "--licence", "mine\x1b[2J"])
    assert packed.exit_code == 0, packed.output
    result = CliRunner().invoke(data.main, ["info", out])
    assert result.exit_code == 0
    for output in (packed.output, result.output):
        assert r"out\x1b[2J" in output
        assert all(character.isprintable() for character in output.replace("\n", ""))
    assert r"mine\x1b[2J" in result.output


@pytest.mark.parametrize("main", MAINS.values(), ids=MAINS)
def test_every_command_is_told(main):
    assert isinstance(main, Command | Group)


@pytest.mark.parametrize(
    ("number", "code", "advice"),
    [
        (errno.ENOSPC, 6, "make room"),
        (errno.EDQUOT, 6, "make room"),
        (errno.EFBIG, 6, "limit on the size of files"),
        (errno.EROFS, 6, "name a place that can be written"),
        (errno.EACCES, 2, "permission"),
        (errno.EPERM, 2, "permission"),
        (errno.ENAMETOOLONG, 2, "shorter name"),
        (errno.ENOENT, 2, "check the path"),
        (errno.EIO, 1, ""),
    ],
)
@pytest.mark.parametrize("name", [None, "folder/na\x1bme"])
def test_errors_of_the_system_have_a_line_and_a_code(number, code, advice, name):
    done = run(OSError(number, os.strerror(number), name))
    assert done.exit_code == code
    shown = r"folder/na\x1bme: " if name else ""
    assert done.output.startswith(f"Error: {shown}{os.strerror(number)}")
    assert advice in done.output
    assert len(done.output.splitlines()) == 1


def test_a_reader_who_has_seen_enough_is_no_error():
    done = run(OSError(errno.EPIPE, "Broken pipe"))
    assert (done.exit_code, done.output) == (1, "")


def test_messages_of_many_lines_become_one():
    done = run(DataError("size  mismatch:\n\n\tone thing\r\n  another\u2028and more\n"))
    assert done.output == "Error: size  mismatch: one thing another and more\n"


def test_an_interrupt_is_told():
    with pytest.raises(Failure) as result, user_errors():
        raise KeyboardInterrupt
    assert (result.value.message, result.value.exit_code) == ("interrupted", 130)


@pytest.mark.parametrize("name", [n for n in vars(cli) if n.startswith("mars_")])
def test_an_interrupt_while_a_command_is_imported_is_told(name, monkeypatch, capsys):
    def interrupted(module):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    with pytest.raises(SystemExit) as end:
        getattr(cli, name)()
    assert end.value.code == 130
    assert capsys.readouterr().err == "Error: interrupted\n"


@pytest.mark.parametrize("name", ["data", "evaluate", "generate", "train"])
def test_each_script_starts_its_command(name, monkeypatch):
    called = []
    monkeypatch.setattr(MAINS[name], "main", lambda *arguments, **options: called.append(name))
    getattr(cli, {"evaluate": "mars_eval"}.get(name, f"mars_{name}"))()
    assert called == [name]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Interrupts as Python has them, also where whoever started the tests has them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


CARELESS = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(PARTS):
        time.sleep(0.001)
except KeyboardInterrupt:
    raise AttributeError("module 'numpy' has no attribute 'matrix'")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there a process cannot send itself an interrupt")
@pytest.mark.parametrize("parts", [1, 100])
def test_an_interrupt_waits_for_the_end_of_an_import(parts, tmp_path, monkeypatch, interruptible):
    (tmp_path / "careless.py").write_text(CARELESS.replace("PARTS", str(parts)))
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    begun = []

    @click.command(cls=Command)
    def command() -> None:
        import careless

        begun.append(careless)
        time.sleep(60)

    try:
        done = CliRunner().invoke(command)
    finally:
        sys.modules.pop("careless", None)
    assert (done.exit_code, done.output) == (130, "Error: interrupted\n")
    assert len(begun) == 1
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(sys.platform == "win32", reason="there a process cannot send itself an interrupt")
def test_a_second_interrupt_does_not_wait(tmp_path, interruptible):
    (tmp_path / "endless.py").write_text(
        "import os, signal, time\nfor _ in range(2): os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)"
    )
    code = (
        "import click; from mars.cli.errors import Command\n"
        "@click.command(cls=Command)\ndef command():\n    import endless\ncommand()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "Error: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="it has no limits on the size of files")
@pytest.mark.parametrize("limit", [0, 20_000])
def test_a_limit_on_the_size_of_files_exits_6(tmp_path, limit):
    import resource

    (tmp_path / "notes").mkdir()
    soundfile.write(tmp_path / "notes" / "a.wav", 0.5 * np.sin(0.1 * np.arange(16_000)), 16_000)
    command = [sys.executable, "-m", "mars.cli.data", "folder", "notes", "--out", "out"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: out cannot be written after 1 notes (File too large)")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
