"""Devices that lack float64, how many threads are too many, and peak memory, which is of the tensors alive at once."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
import torch
from click.testing import CliRunner

from mars.cli import data, evaluate, generate, train
from mars.config import preset
from mars.errors import ConfigError
from mars.runtime import MOST_THREADS, ahead, float64_device, peak_memory, set_threads, thread_pool

CPU = torch.device("cpu")


def test_mps_gives_way_to_the_cpu():
    found = [float64_device(torch.device(name)).type for name in ("cpu", "cuda", "mps")]
    assert found == ["cpu", "cuda", "cpu"]


@pytest.fixture
def told(monkeypatch) -> list[int]:
    """What PyTorch is told, which it is not: the tests after this one have threads, too."""
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    return numbers


def test_threads_are_those_asked_for(told):
    for number in (None, 1, 2, 256, MOST_THREADS):
        set_threads(number)
    assert told == [1, 2, 256, MOST_THREADS]


@pytest.mark.parametrize("number", [-1, 0, MOST_THREADS + 1, 100_000])
def test_threads_that_would_not_run_are_refused(number, told):
    with pytest.raises(ConfigError, match=rf"threads: want 1 to {MOST_THREADS}, got {number}; more than the \d+ proc"):
        set_threads(number)
    assert told == []


def commands(command: click.Command, name: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        for key, part in command.commands.items():
            yield from commands(part, (*name, key))
    elif any(option.name == "threads" for option in command.params):
        yield name, command


WITH_THREADS = dict(
    found
    for module, name in ((train, "train"), (generate, "generate"), (evaluate, "eval"), (data, "data"))
    for found in commands(module.main, (name,))
)
ARGUMENTS = {
    ("eval", "run"): ["--real", ".", "--fake", "."],
    ("eval", "train-classifier"): ["--task", "pitch"],
    ("train", "finetune"): ["."],
    ("data", "tokens"): ["--out", "tokens"],
}


@pytest.mark.parametrize("name", WITH_THREADS, ids=" ".join)
def test_every_command_says_how_many_threads_there_may_be(name, tmp_path, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*ARGUMENTS.get(name, []), "--threads", "100000", "--device", "cpu"]
    result = CliRunner().invoke(WITH_THREADS[name], arguments)
    assert result.exit_code == ConfigError.code, result.output
    assert f"threads: want 1 to {MOST_THREADS}, got 100000" in result.output
    assert "Traceback" not in result.output
    assert told == []


def test_the_commands_that_compute_are_among_those():
    assert {("train", "tokenizer"), ("train", "var"), ("generate",), ("eval", "run")} <= set(WITH_THREADS)


def test_threads_that_make_batches_have_a_limit():
    for number in (0, 256):
        assert preset("notes", [f"train.var.workers={number}"]).train.var.workers == number
    for number in (-1, 257, 100_000):
        with pytest.raises(ConfigError, match=f"train.workers must be 0 to 256, got {number}"):
            preset("notes", [f"train.var.workers={number}"])


def test_counts_what_is_alive_at_once():
    def run():
        a = torch.ones(1000, 1000)
        b = a @ a
        del a
        c = b.softmax(-1)
        del b, c

    assert peak_memory(run, CPU) == 8_000_000  # two of the three at any time


def test_memory_held_before_does_not_count():
    held = [torch.ones(1_000_000)]
    assert peak_memory(lambda: held.append(torch.ones(500_000)), CPU) == 2_000_000
    assert peak_memory(lambda: held[0].add_(1), CPU) < 100  # the 1 as a tensor


def test_work_ahead_comes_in_order_and_never_too_far():
    asked = []

    def items():
        for i in range(9):
            asked.append(i)
            yield i

    with thread_pool(2) as pool:
        for got in ahead(pool, lambda i: i * i, items(), 3):
            assert len(asked) <= int(got**0.5) + 3
        assert list(ahead(pool, str, range(4), 1)) == ["0", "1", "2", "3"]
        assert list(ahead(pool, str, [], 2)) == []
        with pytest.raises(ZeroDivisionError):
            list(ahead(pool, lambda i: 1 // i, [1, 0, 1], 2))
    assert list(ahead(None, str, range(3), 1)) == ["0", "1", "2"]
