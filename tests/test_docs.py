"""The examples in README and docs: Python is run, page by page; command lines are held against the commands' options.

What a block of Python needs beforehand may stand in a comment in front of it, which readers of the page do not see:

    <!-- run first
    make_a_folder_of_notes("recordings")
    -->

and a block that cannot be run is preceded by `<!-- not run: why -->`.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest
import soundfile

from mars.data import builtin

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?:<!-- (?P<comment>run first|not run)(?P<text>.*?)-->\s*)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n"
    r"(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)
GROUPS = {
    "mars-train": "train",
    "mars-generate": "generate",
    "mars-instrument": "instrument",
    "mars-data": "data",
    "mars-eval": "evaluate",
}
RUN = re.compile(r"(?:mars-\w+|-m mars\.cli\.\w+)\b")


def make_a_folder_of_notes(folder: str, count: int = 10) -> None:
    """Some of the built-in notes as WAVs, under names as NSynth has them."""
    dataset = builtin.load()
    Path(folder).mkdir(parents=True)
    for name, sound in zip(dataset.names[:count], dataset.waveforms(range(count)), strict=False):
        soundfile.write(Path(folder, f"{name}.wav"), sound.numpy(), dataset.sample_rate)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str, str, str]]:
    """Line, kind of comment in front, its text, and code of each block in one of the languages."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match["language"] in languages:
            line = text.count("\n", 0, match.start("code")) + 1
            yield line, match["comment"] or "", (match["text"] or "").strip(), textwrap.dedent(match["code"])


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Line and words of each of our commands in the shell blocks of a page."""
    for line, _, _, code in blocks(page, "sh", "bash", "console", "shell"):
        for number, text in enumerate(re.sub(r"\\\n", "  ", code).splitlines()):
            text = text.removeprefix("$ ")
            if not RUN.search(text):
                continue
            words = shlex.split(text.replace("…", "REST"), comments=True)
            for at, word in enumerate(words):
                if word.startswith("mars.cli.") and words[at - 1] == "-m":
                    name = word.removeprefix("mars.cli.").replace("evaluate", "eval")
                    yield line + number, [f"mars-{name}", *words[at + 1 :]]
                elif word in GROUPS:
                    yield line + number, words[at:]
                    break


def split(words: list[str]) -> list[str]:
    """The words up to the end of the command: a pipe, a redirection, another command."""
    ends = [at for at, word in enumerate(words) if word in ("|", "&&", ";", "&", ">", "||")]
    return words[: min(ends, default=len(words))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_of_command_lines_exist(page):
    for line, words in commands(page):
        name, *rest = split(words)
        command = import_module(f"mars.cli.{GROUPS[name]}").main
        where = f"{name_of(page)}:{line}: {' '.join(words)}"
        while isinstance(command, click.Group):
            if rest and rest[0] in command.commands:
                command = command.commands[rest.pop(0)]
            else:
                assert not rest or rest[0].startswith("-") or rest[0] == "REST", f"{where}: no command {rest[0]}"
                break
        options = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
        used = [word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)]
        assert [flag for flag in used if flag not in options] == [], where


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "python"))], ids=name_of)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "__main__", "make_a_folder_of_notes": make_a_folder_of_notes}
    for line, comment, text, code in blocks(page, "python"):
        if comment == "not run":
            assert re.match(r": \w+ \w+", text), f"{name_of(page)}:{line}: say why it is not run"
            continue
        for source in (text, code) if comment == "run first" else (code,):
            try:
                exec(compile(source, f"{name_of(page)}:{line}", "exec"), space)  # noqa: S102  # our own pages
            except Exception as error:
                error.add_note(f"in the block at {name_of(page)}:{line}")
                raise
