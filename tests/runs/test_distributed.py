"""Several processes, over gloo on a CPU: they train as one does, stop together, and none outlives a lost one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mars import checkpoint, model
from mars.config import TrainConfig
from mars.data import open_dataset
from mars.errors import ConfigError, Diverged, LostProcess
from mars.runs.distributed import ALONE, World, join, teardown
from mars.runs.folder import RunFolder
from mars.train.loop import batch_indices
from mars.train.start import train
from tests.train import processes

ROOT = Path(__file__).resolve().parents[2]
RUNS = [
    *(("two", name) for name in processes.SETTINGS),
    *(("sharded", name) for name in ("var", "muon")),
    *(("moved", name) for name in ("tokenizer", "var")),
]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts `python -m` with these arguments and environment variables; nothing started outlives the tests."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **variables: object) -> subprocess.Popen[str]:
        inherited = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", *map(str, arguments)],
            env=inherited | {name: str(value) for name, value in variables.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def pair(start) -> Callable[..., list[subprocess.Popen[str]]]:
    """Starts the same twice, with the environment that torchrun would give to two processes."""

    def pair(*arguments: object, **variables: object) -> list[subprocess.Popen[str]]:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [start(*arguments, **variables, **common, RANK=rank, LOCAL_RANK=rank) for rank in (0, 1)]

    return pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pair) -> Path:
    """All runs: by one process (`one`), by two (`two`), sharded over two (`sharded`), by one, two and one (`moved`)."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (processes.TokenizerStage, "batch"),
            (processes.VARStage, "batch"),
            (processes.tokenizer, "Discriminator"),
        ):
            patch.setattr(owner, name, getattr(owner, name))  # so that what is prepared is undone
        loaded: list[list[int]] = []
        processes.prepare(loaded)
        for name in processes.SETTINGS:
            processes.train(name, folder / "one" / name)
        loaded.clear()
        for name in ("tokenizer", "var"):
            processes.train(name, folder / "moved" / name, max_steps=2)
        for process in pair("tests.train.processes", folder):
            output, _ = process.communicate(timeout=900)
            assert process.returncode == 0, output
        for name in ("tokenizer", "var"):
            processes.train(name, folder / "moved" / name)
        (folder / "loaded.json").write_text(json.dumps(loaded))
    return folder


def metrics(run: Path) -> dict[tuple[int, str], float]:
    """What was logged, by step and name."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    apart = ("step", "time", "notes_per_s", "memory_mb")
    return {(r["step"], k): v for r in records if "event" not in r for k, v in r.items() if k not in apart}


def tensors(run: Path, group: str) -> dict[str, torch.Tensor]:
    newest = RunFolder(run).checkpoints()[0]
    assert newest.name == "step-00000006"
    checkpoint.verify(newest)
    return checkpoint.read_tensors(newest / f"{group}.safetensors")


@pytest.mark.parametrize(("how", "name"), RUNS)
def test_two_processes_train_as_one(how, name, folder):
    one, other = metrics(folder / "one" / name), metrics(folder / how / name)
    assert {step for step, key in one if key == "loss"} == {1, 2, 3, 4, 5, 6}
    assert one.keys() <= other.keys()  # the end of a session validates once more
    for key, value in one.items():
        assert other[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key  # logged with six decimals
    if name == "adversarial":
        assert [step for step, key in one if key == "discriminator"] == [3, 4, 5, 6]


@pytest.mark.parametrize(("how", "name"), RUNS)
def test_two_processes_write_the_checkpoint_of_one(how, name, folder):
    adversarial = ("discriminator", "d_optimizer") if name == "adversarial" else ()
    # Muon orthogonalises in bfloat16, in which a sharded product rounds otherwise.
    limit = 5e-3 if (how, name) == ("sharded", "muon") else 1e-4
    for group in ("model", "averaged", "optimizer", *adversarial):
        one, other = tensors(folder / "one" / name, group), tensors(folder / how / name, group)
        assert {k: (t.shape, t.dtype) for k, t in one.items()} == {k: (t.shape, t.dtype) for k, t in other.items()}
        a, b = (torch.cat([t[k].flatten() for k in one]) for t in (one, other))
        assert (a - b).norm() <= limit * a.norm(), group


@pytest.mark.parametrize(("name", "whole"), [("adversarial", "two"), ("var", "sharded")])
def test_two_processes_resume_to_the_bit(name, whole, folder):
    for group in ("model", "averaged", "optimizer"):
        one, other = tensors(folder / whole / name, group), tensors(folder / "parts" / name, group)
        assert [key for key, t in one.items() if not torch.equal(t, other[key])] == []


@pytest.mark.parametrize("how", ["corrupted", "corrupted-sharded"])
def test_what_is_not_finite_in_one_process_is_skipped_by_all(how, folder):
    one, other = metrics(folder / "one" / "var"), metrics(folder / how / "var")
    assert other[1, "loss"] == pytest.approx(one[1, "loss"], rel=1e-5)
    assert [step for (step, key), value in other.items() if key == "loss" and value is None] == [2]
    assert other[3, "loss"] != pytest.approx(one[3, "loss"], rel=1e-5)  # it lacks an update
    for group in ("model", "averaged", "optimizer"):
        assert all(t.isfinite().all() for t in tensors(folder / how / "var", group).values())
    assert tensors(folder / how / "var", "optimizer")["head.weight/step"] == 5


def test_shards_take_half_the_memory(folder):
    first, second = (json.loads((folder / f"held-{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == len(second) >= 2 * 2 * 4  # runs, saves; weights, averages, optimiser, and averages again
    for (mine, whole), (others, same) in zip(first, second, strict=True):
        assert whole == same
        assert whole <= mine + others <= 1.02 * whole  # the counts of steps are in both
        assert max(mine, others) <= 0.6 * whole  # rows are not split


def test_a_model_trained_in_parts_is_exported_whole(folder):
    sharded = model.load(folder / "sharded" / "var")
    ema = tensors(folder / "sharded" / "var", "averaged")
    assert all(torch.equal(t, ema[name]) for name, t in sharded.var.state_dict().items())


def test_the_order_of_the_notes_is_that_of_one_process(folder):
    alone, first, second = (json.loads((folder / f"loaded{who}.json").read_text()) for who in ("", "-0", "-1"))
    notes = open_dataset(None).split("train")
    for stage in (0, 1):  # two steps by one process, two by two, two by one; four micro-batches each
        drawn = alone[stage * 8 : stage * 8 + 8]
        for step in (0, 1):
            where = slice(stage * 4 + step * 2, stage * 4 + step * 2 + 2)
            drawn += first[where] + second[where]
        drawn += alone[16 + stage * 8 : 16 + stage * 8 + 8]
        expected = [np.split(batch_indices(0, step, 16, notes), 4) for step in range(6)]
        assert drawn == [part.tolist() for parts in expected for part in parts]


def options(out: Path, *settings: str) -> list[object]:
    """Of a tokenizer run that goes on until it is stopped."""
    never = ("train.steps=1000000", "train.save_every=1000000", "train.validate_every=1000000")  # the best is saved too
    chosen = (*processes.SETTINGS["tokenizer"], *never, *settings)
    pairs = [word for item in chosen for word in ("--set", item)]
    return ["mars.cli.train", "tokenizer", "--device", "cpu", "--preset", "smoke", "--out", out, *pairs]


def wait_for_steps(out: Path, process: subprocess.Popen[str]) -> None:
    """Until the run in `out` has logged a step."""
    for _ in range(6000):  # starting takes a busy machine long
        if (out / "log.jsonl").is_file() and '"loss"' in (out / "log.jsonl").read_text():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError("no step within ten minutes")


def test_a_signal_to_one_process_stops_all_and_saves(tmp_path, pair):
    main, other = pair(*options(tmp_path / "run"))
    wait_for_steps(tmp_path / "run", main)
    other.send_signal(signal.SIGTERM)
    (said, _), (silent, _) = main.communicate(timeout=600), other.communicate(timeout=600)
    assert (main.returncode, other.returncode) == (0, 0), said + silent
    (saved,) = RunFolder(tmp_path / "run").checkpoints()
    checkpoint.verify(saved)
    assert f"stopped at step {int(saved.name[5:]):,} of 1,000,000; saved in" in said
    assert silent == ""
    model.load(tmp_path / "run")


TORCHRUN = ("torch.distributed.run", "--nproc-per-node", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")


def children(parent: int) -> list[int]:
    """Processes that this one has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for torchrun's children in /proc")
def test_a_lost_process_ends_the_others(tmp_path, start):
    torchrun = start(*TORCHRUN, "-m", *options(tmp_path / "run"))
    wait_for_steps(tmp_path / "run", torchrun)
    workers = children(torchrun.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    output, _ = torchrun.communicate(timeout=300)  # half of what one process waits for another
    assert torchrun.returncode != 0
    assert "Error: lost another process of this run (" in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_micro_batches_that_cannot_be_shared_are_a_usage_error(tmp_path, pair):
    whose = ("", "process 1: ")
    for label, process in zip(whose, pair(*options(tmp_path / "run", "train.accumulate=3")), strict=True):
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 2
        assert output == (
            f"Error: {label}train.accumulate must be a multiple of the 2 processes, got 3; "
            "train.batch_size=3 train.accumulate=4 keep the 12 notes a step\n"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("size", "batch", "accumulate", "cure"),
    [
        (2, 4, 1, "train.batch_size=2 train.accumulate=2 keep the 4 notes"),
        (8, 32, 12, "train.batch_size=24 train.accumulate=16 keep the 384 notes"),
        (4, 1, 6, "no train.batch_size keeps the 6 notes a step, so start another number of processes"),
        (2, 6, 1, "train.batch_size=3 train.accumulate=2 keep the 6 notes"),
    ],
)
def test_the_message_says_what_can_be_shared(size, batch, accumulate, cure):
    with pytest.raises(ConfigError, match=f"multiple of the {size} processes, got {accumulate}; {cure}"):
        World(0, size).check(TrainConfig(batch_size=batch, accumulate=accumulate))
    World(0, size).check(TrainConfig(batch_size=batch, accumulate=size * 3))


def test_micro_batches_are_shared_in_blocks():
    assert [list(World(rank, 3).share(6)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert list(ALONE.share(5)) == [0, 1, 2, 3, 4]


def test_without_torchrun_there_is_one_process(monkeypatch):
    module, tensor = torch.nn.Linear(2, 2), torch.ones(3)
    for variables in ({}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        world = join(torch.device("cpu"))
        assert world == ALONE
        assert world.main
        assert world.wrap(module) is module
        assert world.all_reduce(tensor) is world.mean(tensor) is world.part(tensor, tensor) is tensor
        assert (world.any(True), world.any(False), world.broadcast("a")) == (True, False, "a")
        assert world.means({"loss": tensor}) == world.gather({"loss": tensor}) == {"loss": tensor}
    assert not torch.distributed.is_initialized()


def test_what_several_processes_cannot_have(monkeypatch):
    with pytest.raises(ConfigError, match="`shard`: there is one process"):
        train("var", shard=True, device="cpu")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="`device` mps: several processes need cpu or cuda"):
        join(torch.device("mps"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 2 of this machine has no GPU; start 2 processes a machine or fewer"):
        join(torch.device("cuda"))
    assert not torch.distributed.is_initialized()


def test_only_a_lost_process_is_reported_as_one():
    closed = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5"
    for error in (RuntimeError(closed), torch.distributed.DistBackendError("NCCL communicator was aborted")):
        with pytest.raises(LostProcess, match="lost another process of this run"), teardown():
            raise error
    for other in (RuntimeError("mat1 and mat2 shapes"), Diverged("the run is in gloomy/"), OSError("gloo")):
        with pytest.raises(type(other)), teardown():
            raise other


ENDING = """
import atexit, sys, torch
from mars.runs import distributed
from mars.cli.train import main

class Late:
    def __del__(self):
        print("Python has shut down")

late = Late()
atexit.register(print, "functions of atexit are run")
distributed.join(torch.device("cpu"))
sys.argv = ["mars-train", "nothing"]
main()
"""


def test_a_process_of_several_ends_before_python_shuts_down(tmp_path, pair):
    (tmp_path / "ending.py").write_text(ENDING, encoding="utf-8")
    for process in pair("ending", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"):
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 2, output
        assert "functions of atexit are run" in output
        assert "Python has shut down" not in output
