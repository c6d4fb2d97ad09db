"""Strike trainers and commands with faults and count what is lost: a Markdown table, and exit code 1 if anything was.

    python -m scripts.reliability [--share 0.05] [--seed 0] [--json FILE]

Processes are forked from this one, which has imported PyTorch and runs one thread, so that a kill costs 0.2 s. A
checkpoint is right if every byte of its tensors is that of the same step in a run that was never disturbed, and so is a
generated note.
"""

from __future__ import annotations

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import dataclasses
import errno
import itertools
import json
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import soundfile
import torch

from mars import checkpoint, lock, model
from mars.cli import data
from mars.cli.generate import main as mars_generate
from mars.errors import CheckpointError, DiskError, MarsError
from mars.files import sha256
from mars.runs.folder import Best, Position, RunFolder
from mars.train.optimizer import Optimizer
from mars.train.tokenizer import TokenizerStage
from mars.train.var import VARStage
from tests import faults
from tests.faults import STEPS, TRAINERS, Disk, arguments, command, fork, wait

Sums = dict[str, str]  # file -> sha256


@dataclass
class Row:
    """One line of the table."""

    fault: str
    trials: int = 0
    failures: list[str] = field(default_factory=list)

    def count(self, *problems: str | None) -> None:
        """One more trial, with what went wrong in it."""
        self.trials += 1
        found = [p for p in problems if p]
        if found:
            self.failures.append("; ".join(found))


@dataclass
class Laboratory:
    """Where the faults are made: a folder, a seed, and what undisturbed runs have written."""

    folder: Path
    seed: int
    share: float  # of the full number of trials
    sums: dict[str, dict[int, Sums]] = field(default_factory=dict)  # of the tensors, by trainer and step
    seconds: dict[str, float] = field(default_factory=dict)  # that an undisturbed run takes

    def __post_init__(self) -> None:
        for trainer in TRAINERS:
            run, began = self.folder / f"straight {trainer}", time.monotonic()
            status = wait(fork(command(self.arguments(trainer, run, f"train.keep={STEPS}")), self.output))
            assert status == 0, self.output.read_text()
            self.seconds[trainer] = time.monotonic() - began
            self.sums[trainer] = {step_of(path): sums(path) for path in RunFolder(run).checkpoints()}
            assert len(self.sums[trainer]) == STEPS

    @property
    def output(self) -> Path:
        """What the last child said."""
        return self.folder / "output.txt"

    def said(self) -> str:
        """The end of what the last child said."""
        return self.output.read_text(errors="replace")[-1000:]

    def arguments(self, trainer: str, run: Path, *overrides: str) -> list[str]:
        return arguments(trainer, run, self.folder / "straight tokenizer", *overrides)

    def random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    def trials(self, full: int) -> int:
        return max(round(full * self.share), 2)

    def points(self, calls: list[str]) -> list[int]:
        """Which calls to strike at: every rename, and a share of the others."""
        return [i for i, call in enumerate(calls) if call == "rename" or i % round(1 / self.share) == 0]

    def new(self, name: str) -> Path:
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path


def step_of(path: Path) -> int:
    return int(path.name[5:])


def sums(path: Path) -> Sums:
    """Of the tensors in a directory, taken from the bytes, not from its manifest."""
    return {p.name: sha256(p) for p in path.glob("*.safetensors")}


def exported(path: Path) -> str:
    """Sum of the trained weights in a model directory, which must load."""
    stage = "tokenizer" if model.load(path).var is None else "var"
    return sha256(checkpoint.current(path) / f"{stage}.safetensors")


def faults_of(run: RunFolder, right: dict[int, Sums], least: int) -> Iterator[str]:
    """What is wrong with a run folder that must hold a checkpoint of step `least` or later."""
    found = run.checkpoints()
    for path in found:
        try:
            checkpoint.verify(path)
        except CheckpointError as error:
            yield f"unreadable: {error}"
        else:
            if sums(path) != right[step_of(path)]:
                yield f"{path.name} holds wrong bytes"
    newest = step_of(found[0]) if found else 0
    if newest < least:
        yield f"step {least} was saved, the newest is {newest}"
    steps = {"model": [newest], "best": [step_of(path) for path in found]}
    for name in ["model"] * bool(newest) + ["best"] * (run.path / "best.json").is_file():
        # An export comes before its checkpoint, so it may be a step ahead.
        allowed = [right[n]["averaged.safetensors"] for s in steps[name] for n in (s, s + 1) if n in right]
        try:
            if exported(run.path / name) not in allowed:
                yield f"{name} holds wrong bytes"
        except MarsError as error:
            yield f"{name} cannot be loaded: {error}"
    if (run.path / "best.json").is_file():
        best = json.loads((run.path / "best.json").read_text())["step"]
        if f"step-{best:08d}" not in [path.name for path in found]:
            yield f"the best checkpoint, of step {best}, is gone"


def leftovers(run: RunFolder) -> str | None:
    """Names of unfinished work in a folder where nothing is being written."""
    names = [p.name for f in (run.path, run.path / "checkpoints") for p in f.glob(".*") if p.name != lock.NAME]
    return f"left over: {', '.join(names)}" if names else None


def kills(lab: Laboratory, trainer: str) -> Row:
    """SIGKILL at random moments; each run goes on until it is done, then a new one starts."""
    row, rng = Row(f"SIGKILL at a random moment, {trainer}, saving every step"), lab.random(1, TRAINERS.index(trainer))
    run, least = RunFolder(lab.new(f"kill {trainer}")), 0
    words = lab.arguments(trainer, run.path)
    while row.trials < lab.trials(100):
        faults.started[:8] = least.to_bytes(8, "little")
        child = fork(command(words), lab.output)
        time.sleep(rng.uniform(0, lab.seconds[trainer]))
        os.kill(child, signal.SIGKILL)
        status = wait(child)
        if status not in (0, -signal.SIGKILL):
            row.count(f"exit code {status}: {lab.said()}")
        begun = int.from_bytes(faults.started[:8], "little")  # the steps before it were saved
        problems = list(faults_of(run, lab.sums[trainer], begun))
        if status == 0:
            lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
            logged = [line["step"] for line in lines if "loss" in line]
            if logged != list(range(1, STEPS + 1)):
                problems.append(f"log of steps {logged}")
            problems += filter(None, [leftovers(run)])
            if problems:
                row.count(*problems)
            least = 0
            shutil.rmtree(run.path)
            continue
        row.count(*problems)
        found = run.checkpoints()
        least = step_of(found[0]) if found else 0
    return row


@dataclass
class Save:
    """One save, ready to be disturbed: a folder before it, the stage, and what is right before and after."""

    name: str
    before: Path
    stage: Any
    position: Position
    right: dict[int, Sums]
    least: int  # the step of the newest intact checkpoint before it

    def run(self, folder: Path) -> RunFolder:
        """A copy of the folder before the save."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.before, folder)
        return RunFolder(folder)

    def save(self, run: RunFolder) -> None:
        run.save(self.position, self.stage)


def saves(lab: Laboratory, trainer: str) -> list[Save]:
    """A run's first save, one over a damaged checkpoint, and one that removes the best one so far."""
    stage, found, right = faults.stage(trainer), [], {}
    stage.train = dataclasses.replace(stage.train, adversarial_start=0.0)
    run = RunFolder(lab.new(f"saves {trainer}"))
    run.path.mkdir()
    for step in (1, 2, 3):
        batches = [stage.batch(np.arange(2) + step)]
        stage.step(step - 1, batches, [torch.Generator().manual_seed(step)])
        frozen = faults.stage(trainer)
        scratch = RunFolder(lab.new("scratch"))
        scratch.save(Position(step), stage)
        scratch.restore(frozen, lambda text: None)
        right[step] = sums(scratch.checkpoints()[0])
        position = Position(step, best=Best(1 if step == 2 else step, "val_loss", 1 / step))
        before = lab.new(f"before {trainer} {step}")
        shutil.copytree(run.path, before)
        run.save(position, stage)
        if step == 2:
            broken = before / "checkpoints" / "step-00000002"
            shutil.copytree(run.path / "checkpoints" / "step-00000002", broken)
            (broken / "model.safetensors").write_bytes(b"broken")
        name = {1: "first save", 2: "overwrite", 3: "prune"}[step]
        found.append(Save(name, before, frozen, position, dict(right), step - 1))
    return found


def calls_of(lab: Laboratory, save: Save) -> list[str]:
    """The calls of one save that change the disk."""

    def count() -> None:
        disk = Disk()
        run = save.run(lab.folder / "trial")
        disk.install()
        save.save(run)
        sys.stdout.write(" ".join(disk.calls))
        sys.stdout.flush()

    status = wait(fork(count, lab.output))
    assert status == 0, lab.said()
    return lab.output.read_text().split()


def settle(lab: Laboratory, save: Save, run: RunFolder, scratch: Any) -> Iterator[str]:
    """What is wrong after a save was disturbed, before and after a new trainer has put it right and saved."""
    for recovered in (False, True):
        if recovered:
            run.recover()
        for path in run.checkpoints():
            if save.name == "overwrite" and (path / "model.safetensors").read_bytes() == b"broken":
                shutil.move(path, lab.new("broken"))  # as it was before
        yield from faults_of(run, save.right, save.least)
    said: list[str] = []
    try:
        position = run.restore(scratch, said.append)
        save.save(run)
    except (MarsError, OSError) as error:
        yield f"cannot go on: {error!r}"
        return
    if position.step < save.least or said:
        yield f"went on at step {position.step} {said}"
    yield from faults_of(run, save.right, save.position.step)
    yield leftovers(run) or ""


def crashes(lab: Laboratory, trainer: str) -> list[Row]:
    """The process dies, or the power fails, or the disk does, at every call of one save."""
    rows = [
        Row(f"crash at every write, fsync, rename, unlink, rmdir of a save, {trainer}"),
        Row(f"power cut at each of these, {trainer}"),
        Row(f"ENOSPC, EDQUOT or EIO from each of these, {trainer}"),
    ]
    scratch = faults.stage(trainer)
    trial = RunFolder(lab.folder / "trial")
    errors = itertools.cycle([errno.ENOSPC, errno.EDQUOT, errno.EIO])
    for save in saves(lab, trainer):
        for row, at in itertools.product(rows, lab.points(calls_of(lab, save))):
            strike = (faults.die, faults.cut_power, faults.failing(next(errors)))[rows.index(row)]

            def disturbed(disk: Disk, save: Save = save) -> None:
                run = save.run(trial.path)
                disk.install()
                save.save(run)

            status = wait(fork(partial(disturbed, Disk(at, strike)), lab.output))
            problems = []
            if row is not rows[2]:
                if status != -signal.SIGKILL:
                    problems.append(f"status {status}: {lab.said()}")
            elif status == 1:
                said = lab.said().splitlines()[-1]
                if not (said.startswith("mars.errors.DiskError") and str(trial.path) in said and "bytes" in said):
                    problems.append(said)
            elif status:
                problems.append(f"status {status}")
            problems += settle(lab, save, trial, scratch)
            row.count(*(f"{save.name}, call {at}: {p}" for p in problems if p))
    return rows


def full_disks(lab: Laboratory, trainer: str) -> Row:
    """No file may grow beyond a limit."""
    row, rng = Row(f"disk full at a random byte (RLIMIT_FSIZE), {trainer}"), lab.random(2, TRAINERS.index(trainer))
    save, scratch = saves(lab, trainer)[2], faults.stage(trainer)
    largest = max(p.stat().st_size for p in (lab.folder / "scratch").rglob("*") if p.is_file())
    trial = RunFolder(lab.folder / "trial")
    for _ in range(lab.trials(50)):
        limit = int(rng.integers(largest))

        def filled(limit: int = limit) -> None:
            run = save.run(trial.path)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                save.save(run)
            except DiskError as error:
                raise SystemExit(error.code if str(trial.path) in str(error) and "bytes" in str(error) else 9) from None

        status = wait(fork(filled, lab.output))
        problems = [] if status == DiskError.code else [f"status {status} at {limit} bytes: {lab.said()}"]
        row.count(*problems, *settle(lab, save, trial, scratch))
    return row


def flat(state: Any) -> dict[str, torch.Tensor]:
    return {f"{group}/{name}": tensor for group, tensors in state.items() for name, tensor in tensors.items()}


def damage(lab: Laboratory, trainer: str) -> Row:
    """The newest checkpoint is damaged and the one before must be used."""
    row = Row(f"damaged checkpoint (bits, truncations, 4 KiB of zeros, files lost, added, swapped), {trainer}")
    rng, scratch, stage = lab.random(3, TRAINERS.index(trainer)), faults.stage(trainer), faults.stage(trainer)
    stage.train = dataclasses.replace(stage.train, keep=3)
    good, wanted = RunFolder(lab.new("good")), {}
    for step in (1, 2, 3):
        stage.step(step - 1, [stage.batch(np.arange(2))], [torch.Generator().manual_seed(step)])
        good.save(Position(step), stage)
        wanted[step] = {name: tensor.clone() for name, tensor in flat(stage.state()).items()}
    contents = {p: p.read_bytes() for p in sorted(good.path.rglob("*")) if p.is_file()}
    newest = good.checkpoints()[0]
    files = sorted(newest.iterdir())
    while row.trials < lab.trials(500):
        kind = rng.choice(list(faults.DAMAGE), p=list(faults.DAMAGE.values()))
        file = files[rng.integers(len(files))]
        kind(file, rng)
        now = {p: p.read_bytes() for p in sorted(good.path.rglob("*")) if p.is_file()}
        if now != contents:  # two equal files may have been swapped
            said: list[str] = []
            used = good.restore(scratch, said.append).step
            state, right = flat(scratch.state()), wanted[used]
            same = state.keys() == right.keys() and all(torch.equal(v, right[k]) for k, v in state.items())
            expected = 1 if kind is faults.swap else 2
            problem = f"{kind.__name__} {file.name}: used step {used}, right bytes: {same}, said {said}"
            row.count(None if used == expected and same and said else problem)
        for path in now.keys() - contents.keys():
            path.unlink()
        for path, content in contents.items():
            if now.get(path) != content:
                path.write_bytes(content)
        scratch = scratch if not row.failures else faults.stage(trainer)
    return row


def signals(lab: Laboratory, trainer: str) -> list[Row]:
    """A signal at a random moment, once or twice."""
    once = Row(f"SIGTERM, SIGINT or SIGUSR1 at a random moment, {trainer}")
    twice = Row(f"the same signal again during that step, {trainer}")
    rng = lab.random(4, TRAINERS.index(trainer))
    for i in range(max(lab.trials(48), 4)):
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[i % 3]
        row = twice if i % 4 == 3 else once
        run = RunFolder(lab.new("signal"))
        # It takes 30 s if nothing stops it. Twice: a step lasts as long as the test wants.
        words = lab.arguments(trainer, run.path, "train.steps=2000", "train.save_every=3", "train.validate_every=5")
        faults.started[:8] = (0).to_bytes(8, "little")
        child = fork(partial(slowly, trainer, words) if row is twice else command(words), lab.output)
        problems = []
        until(lambda: faults.started[:8] != bytes(8))
        if row is once:
            time.sleep(rng.uniform(0, 0.5))
        os.kill(child, number)
        if row is twice:
            time.sleep(0.05)
            os.kill(child, number)
        began = time.monotonic()
        status = wait(child)
        if time.monotonic() - began > 10:
            problems.append(f"took {time.monotonic() - began:.1f} s")
        if row is once:
            done = int.from_bytes(faults.started[:8], "little") + 1
            saved = [step_of(path) for path in run.checkpoints()]
            if status or saved[:1] != [done]:
                problems.append(f"signal {number}: exit code {status}, {done} steps done, saved {saved}: {lab.said()}")
        elif status not in (-number, 128 + number):
            problems.append(f"signal {number} twice: exit code {status}")
        row.count(*problems)
    return [once, twice]


def until(happened: Callable[[], Any]) -> None:
    """Wait for something that a child must do."""
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end, "a trainer does not start"
        time.sleep(0.01)


def slowly(trainer: str, words: list[str]) -> None:
    """Run a trainer whose second step never ends."""
    kind = TokenizerStage if trainer == "tokenizer" else VARStage
    quick = kind.step

    def step(self: Any, step: int, *inputs: Any) -> Any:
        result = quick(self, step, *inputs)
        while step == 1:
            time.sleep(0.01)
        return result

    kind.step = step  # type: ignore[method-assign]
    command(words)()


def infinities(lab: Laboratory, trainer: str) -> Row:
    """NaN or infinity gets into a step, or into the weights."""
    row, rng = (
        Row(f"NaN or infinity in inputs, gradients, weights or moments, {trainer}"),
        lab.random(5, TRAINERS.index(trainer)),
    )
    places = ["inputs", "gradients", "model", "averaged", "optimizer"]
    places += ["discriminator"] if trainer == "tokenizer" else []
    for i in range(lab.trials(30)):
        place, value = places[i % len(places)], float(rng.choice([np.nan, np.inf, -np.inf]))
        first, count = int(rng.integers(5, 9)), int(rng.integers(1, 13))
        run = RunFolder(lab.new("infinity"))
        words = lab.arguments(trainer, run.path, "train.steps=30", "train.save_every=1", "train.keep=99")
        status = wait(fork(partial(poisoned, trainer, words, place, value, range(first, first + count)), lab.output))
        transient = place in ("inputs", "gradients")
        problems = []
        if status != (5 if not transient or count >= 10 else 0):
            problems.append(f"exit code {status}: {lab.said()}")
        if transient and count >= 10 and not problems:
            listed = json.loads((run.path / "diverged.json").read_text())
            if [entry["step"] for entry in listed] != list(range(first + 1, first + 11)) or not all(
                len(entry["notes"]) == 2 and str(entry["notes"][0]).startswith("note ") for entry in listed
            ):
                problems.append(f"diverged.json: {listed}")
        for path in run.checkpoints():
            checkpoint.verify(path)
            position = checkpoint.read_json(path / "state.json")
            if transient and position["skipped"] != len(range(first, min(first + count, position["step"]))):
                problems.append(f"{path.name} says {position['skipped']} skipped")
            files = {file.stem: checkpoint.read_tensors(file) for file in path.glob("*.safetensors")}
            problems += [f"{path.name}: {n} is not finite" for n, t in flat(files).items() if not t.isfinite().all()]
        row.count(*(f"{place} {value} x {count} from {first}: {p}" for p in problems))
    return row


def poisoned(trainer: str, words: list[str], place: str, value: float, when: range) -> None:
    """Run a trainer with `value` in one place at these steps; in weights and moments after the first of them."""
    kind = TokenizerStage if trainer == "tokenizer" else VARStage
    clean, clip, corrupted = kind.step, Optimizer.clip, [False]

    def step(self: Any, step: int, batches: list[Any], streams: Any) -> Any:
        corrupted[0] = step in when
        if corrupted[0] and place == "inputs":
            batches = [(b[0], b[1] * value, b[2]) if isinstance(b, tuple) else b * value for b in batches]
        result = clean(self, step, batches, streams)
        if step == when[0] and place in self.state():
            tensors = [t.data for t in self.state()[place].values() if t.is_floating_point() and t.ndim > 0]
            tensor = tensors[step % len(tensors)]
            tensor[(0,) * tensor.ndim] = value
        return result

    def poison(self: Optimizer) -> Any:
        if corrupted[0] and place == "gradients":
            gradient = self.parameters[-1].grad
            assert gradient is not None
            gradient[(0,) * gradient.ndim] = value
        return clip(self)

    kind.step, Optimizer.clip = step, poison  # type: ignore[method-assign]
    command(words)()


def rivals(lab: Laboratory, trainer: str) -> Row:
    """Two trainers in one folder: one goes on, the other is told who has it."""
    row = Row(f"two trainers started on one run folder, {trainer}")
    for _ in range(lab.trials(10)):
        run = RunFolder(lab.new("rivals"))
        words = lab.arguments(trainer, run.path, "train.steps=2000")
        outputs = {fork(command(words), out): out for out in (lab.folder / "one.txt", lab.folder / "other.txt")}
        first, status = os.waitpid(-1, 0)
        (other,) = outputs.keys() - {first}
        said, code = outputs[first].read_text(), os.waitstatus_to_exitcode(status)
        refused = code == 2 and f"is in use by process {other} on" in " ".join(said.split())
        until(run.checkpoints)
        os.kill(other, signal.SIGTERM)
        ended = wait(other)
        row.count(None if refused and ended == 0 else f"exit codes {code} and {ended}: {said}")
    return row


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file in a folder and those below, by its path from there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kills_of_generation(lab: Laboratory) -> list[Row]:
    """SIGKILL of mars-generate at random moments; the same command goes on until it is done, then with a new folder."""
    row, rng = Row("SIGKILL at a random moment, mars-generate, then the same command"), lab.random(8)

    def generating(out: Path) -> Callable[[], None]:
        words = ["-n", "40", "--batch-size", "8", "--model", str(lab.folder / "straight var"), "--out", str(out)]
        return lambda: mars_generate([*words, "--device", "cpu", "--threads", "1"], prog_name="mars-generate")

    straight, began = lab.new("notes"), time.monotonic()
    status = wait(fork(generating(straight), lab.output))
    assert status == 0, lab.said()
    seconds = time.monotonic() - began
    right = contents(straight)
    out = lab.new("killed notes")
    while row.trials < lab.trials(50):
        child = fork(generating(out), lab.output)
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        status = wait(child)
        found = contents(out)
        problems = [f"exit code {status}: {lab.said()}"] if status not in (0, -signal.SIGKILL) else []
        problems += [f"{name} holds wrong bytes" for name in found if name.endswith(".wav") and name[0] != "."
                     and found[name] != right.get(name)]  # fmt: skip
        if "notes.json" not in found and any(name.endswith(".wav") and name[0] != "." for name in found):
            problems.append("notes without a listing")
        if status == 0:
            problems += [f"{name} differs" for name in sorted(right.keys() | found.keys())
                         if found.get(name) != right.get(name)]  # fmt: skip
            if problems:
                row.count(*problems)
            shutil.rmtree(out)
            continue
        row.count(*problems)
    return [row]


def sounds(folder: Path) -> tuple[Path, Path]:
    """Two dozen notes as a folder and as an archive of NSynth."""
    names = [f"{family}_acoustic_{i:03d}-060-100" for family in ("brass", "flute") for i in range(12)]
    (folder / "audio").mkdir(parents=True)
    for i, name in enumerate(names):
        tone = 0.5 * np.sin(np.arange(64_000) / (9 + i))
        soundfile.write(folder / "audio" / f"{name}.wav", tone, 16_000, subtype="PCM_16")
    archive = folder.with_name("nsynth.tar.gz")
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(folder, "nsynth-train")
    return folder, archive


def packed(out: Path) -> Sums:
    """Of every file of a dataset."""
    return {p.name: sha256(p) for p in out.iterdir()}


def kills_of_packing(lab: Laboratory) -> list[Row]:
    """SIGKILL at random moments of `mars-data`, which starts again, with process ids that repeat as in a container."""
    rows = []
    for number, (kind, source) in enumerate(zip(("folder", "nsynth"), sounds(lab.new("sounds")), strict=True)):
        row, rng = Row(f"SIGKILL at a random moment, mars-data {kind}, started again"), lab.random(7, number)

        def pack(out: Path, kind: str = kind, source: Path = source) -> None:
            os.getpid = lambda: 1
            data.main([kind, str(source), "--out", str(out)], prog_name="mars-data")

        whole = lab.new("packed") / "out"
        began = time.monotonic()
        status = wait(fork(partial(pack, whole), lab.output))
        assert status == 0, lab.said()
        seconds, right = time.monotonic() - began, packed(whole)
        while row.trials < lab.trials(100):
            out = lab.new("packing") / "out"
            child = fork(partial(pack, out), lab.output)
            time.sleep(rng.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            problems = [] if wait(child) in (0, -signal.SIGKILL) else [f"killed: {lab.said()}"]
            done = out.exists()
            status = wait(fork(partial(pack, out), lab.output))  # refused if it was done
            if status != (2 if done else 0) or (done and "exists" not in lab.said()):
                problems.append(f"started again: exit code {status}: {lab.said()}")
            if not out.exists() or packed(out) != right:
                problems.append("other bytes than undisturbed")
            if left := [p.name for p in out.parent.iterdir() if p != out]:
                problems.append(f"left over: {', '.join(left)}")
            row.count(*problems)
        rows.append(row)
    return rows


CAMPAIGNS: dict[str, Callable[[Laboratory, str], Row | list[Row]]] = {
    "kills": kills,
    "crashes": crashes,
    "damage": damage,
    "full disks": full_disks,
    "signals": signals,
    "infinities": infinities,
    "rivals": rivals,
}
COMMANDS: dict[str, Callable[[Laboratory], list[Row]]] = {
    "generation": kills_of_generation,
    "packing": kills_of_packing,
}


@click.command()
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Of the full number of trials.")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--only", type=click.Choice([*CAMPAIGNS, *COMMANDS]), multiple=True, help="These campaigns.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write the rows here too.")
def main(share: float, seed: int, only: tuple[str, ...], report: Path | None) -> None:
    """Strike trainers and commands with faults and count what is lost."""
    faults.prepare()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="mars ü ") as folder:
        (Path(folder) / "real").mkdir()
        (Path(folder) / "link").symlink_to("real")
        lab = Laboratory(Path(folder) / "link", seed, share)
        for name, campaign in CAMPAIGNS.items():
            for trainer in TRAINERS if not only or name in only else ():
                result = campaign(lab, trainer)
                rows += result if isinstance(result, list) else [result]
        for name, strike in COMMANDS.items():
            rows += strike(lab) if not only or name in only else []
    print("| fault | trials | failures |\n|---|---|---|")
    for row in rows:
        print(f"| {row.fault} | {row.trials:,} | {len(row.failures)} |")
    for row in rows:
        for failure in row.failures[:5]:
            print(f"\n{row.fault}: {failure}", file=sys.stderr)
    if report is not None:
        report.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    sys.exit(any(row.failures for row in rows))


if __name__ == "__main__":
    main()
