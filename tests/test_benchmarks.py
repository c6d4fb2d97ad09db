"""The benchmarks' own machinery: seeds, comparisons, what a failing one ends in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_multiscale_quantize as bench
from benchmarks.contenders import Place
from mars.kernels import multiscale_quantize

ROOT = Path(__file__).parents[1]

SOURCE = """
import torch
from benchmarks.contenders import Contender, Place, race

DRAWN = []


def bench_draws(benchmark, place):
    DRAWN.append(torch.rand(9))
    assert torch.equal(DRAWN[0], DRAWN[-1])
    benchmark(int)


def differs(result, ours):
    assert result == ours, "these differ"


def bench_differs(benchmark):
    contenders = {"ours": Contender(lambda: 1), "theirs": Contender(lambda: 2, check=differs)}
    race(benchmark, Place("cpu", 1), contenders)


def bench_forgets(benchmark):
    pass
"""


def test_inputs_are_seeded_and_a_comparison_that_fails_is_one_failure(tmp_path):
    (tmp_path / "bench_it.py").write_text(SOURCE)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-p", "benchmarks.conftest"),
            *("-p", "no:cacheprovider", "--benchmark-disable", "-q", "-rfE", tmp_path / "bench_it.py"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(r"^FAILED .*bench_differs - AssertionError: these differ", done.stdout, re.M), done.stdout
    assert re.search(r"^ERROR .*bench_forgets - .*Benchmark fixture was not used", done.stdout, re.M)
    assert re.search(r"^1 failed, \d passed, 1 error", done.stdout, re.M)


TIMED = """
from benchmarks.contenders import Contender, Place, race

CALLS = []


def sleepy():
    CALLS.append(0)
    if len(CALLS) == STOP_AT:  # as Ctrl-C does
        raise KeyboardInterrupt


def bench_whole(benchmark):
    race(benchmark, Place("cpu", 2), {"ours": Contender(int), "theirs": Contender(list)}, targets={"theirs": 1.5})


def bench_stopped(benchmark):
    race(benchmark, Place("cpu", 2), {"ours": Contender(sleepy), "others": Contender(list)}, rounds=20)


def bench_never(benchmark):
    race(benchmark, Place("cpu", 2), {"ours": Contender(int), "nobody": Contender(list)})
"""


@pytest.mark.parametrize(("stop_at", "seen"), [(6, 3), (3, 0)], ids=["later", "in the first round"])
def test_an_interrupted_run_ends_with_the_table_of_what_was_timed(stop_at, seen, tmp_path):
    """That is what was finished, and the rounds of the benchmark that it was stopped in."""
    (tmp_path / "bench_it.py").write_text(TIMED.replace("STOP_AT", str(stop_at)))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-p", "benchmarks.conftest"),
            *("-p", "no:cacheprovider", "--benchmark-only", "-q", tmp_path / "bench_it.py"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    table = done.stdout[done.stdout.index("| case | contender | ms |") :]
    assert re.search(r"^\| 2 threads \| ours \| [\d.e-]+ \(.*\n\|  \| theirs \| .* \| ≥ 1.5 \|", table, re.M)
    assert ("| others |" in table) == (seen > 0)
    assert "| nobody |" not in table
    saved = json.loads((tmp_path / ".benchmarks/latest.json").read_text())["benchmarks"]
    assert [b["stats"]["rounds"] for b in saved if b["name"] == "bench_stopped"] == ([seen] if seen else [])


class Disabled:
    """What pytest-benchmark gives where nothing is timed."""

    enabled = False

    def __init__(self):
        self.extra_info = {}

    def __call__(self, function):
        return function()


@pytest.mark.parametrize("wrong", [False, True], ids=["another token", "another gradient"])
def test_gradients_are_compared_where_the_tokens_agree(wrong, monkeypatch):
    """One map of thirty has other tokens, as where two codes are equally near; then all maps have other sums."""

    def other(f, *weights):
        f = f.clone()
        f[3] = f[4]
        ids, totals = multiscale_quantize(f, *weights)
        return ids, totals * 1.01 if wrong else totals

    monkeypatch.setattr(bench, "multiscale_quantize", other)
    monkeypatch.setattr(bench, "sized", lambda benchmark, rows: 30 * 155)
    if wrong:
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            bench.bench_gradient(Disabled(), Place("cpu", 1), "notes")
    else:
        bench.bench_gradient(Disabled(), Place("cpu", 1), "notes")


def test_too_many_maps_of_other_tokens_are_refused():
    ids = torch.arange(40).view(20, 2)
    assert bench.agreeing(ids, ids).all()
    other = ids.clone()
    other[:2, 1] = 0
    assert bench.agreeing(ids, other).tolist() == [False] * 2 + [True] * 18
    other[:3, 1] = 0
    with pytest.raises(AssertionError):
        bench.agreeing(ids, other)
