"""Small trainers that can be killed, and faults to strike them with; for processes with one thread that may fork."""

from __future__ import annotations

import builtins
import io
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mars.cli.train import main
from mars.config import Config, override, preset
from mars.data import Dataset
from mars.models.discriminator import Discriminator
from mars.models.tokenizer import Tokenizer
from mars.runs.distributed import ALONE
from mars.train import start
from mars.train import tokenizer as tokenizer_stage
from mars.train.tokenizer import TokenizerStage
from mars.train.tokens import tokenize
from mars.train.var import VARStage

TRAINERS = ("tokenizer", "var")
STEPS, SEED = 12, 3
MODEL = (
    *("audio.n_fft=128", "audio.hop=64", "audio.bins=64", "audio.frames=32", "audio.samples=1900", "audio.cmx=2,1"),
    *("tokenizer.patch=16,16", "tokenizer.width=8", "tokenizer.scales=[1,2]", "tokenizer.codebook_size=16"),
    *("tokenizer.code_dim=4", "tokenizer.quantizer_dropout=0.5"),
)
TRAIN = (
    *("var.width=8", "var.depth=1", f"train.steps={STEPS}", "train.batch_size=2", "train.save_every=1", "train.keep=2"),
    *("train.validate_every=2", "train.validate_notes=2", "train.log_every=1", "train.precision=float32"),
)
ADVERSARIAL = ("train.adversarial=true", "train.adversarial_start=0.4")  # it joins at the sixth step
started = mmap.mmap(-1, 8)  # shared with forked processes: the index of the last step begun


def notes() -> Dataset:
    """Six short notes; the last two are held out."""
    tones = np.sin(np.outer(np.arange(1, 7), np.arange(1900) / 9))
    metadata = np.zeros((6, 6), np.int32)
    metadata[:, 0] = metadata[:, 3] = np.arange(6)
    metadata[4:, 5] = 1
    names = [f"note {i}" for i in range(6)]
    return Dataset((tones * 20_000).astype("<i2"), metadata, names, names, 16_000, "0" * 64, {"source": "test"})


def prepare() -> None:
    """Let the trainers of this process use `notes`, a narrow discriminator, and tell `started` how far they are."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    start.open_dataset = lambda path: notes()
    tokenizer_stage.Discriminator = partial(Discriminator, width=4)
    for stage in (TokenizerStage, VARStage):

        def step(self: Any, step: int, *inputs: Any, original: Any = stage.step) -> Any:
            started[:8] = step.to_bytes(8, "little")
            return original(self, step, *inputs)

        stage.step = step


def arguments(trainer: str, out: Path, tokenizer: Path, *overrides: str) -> list[str]:
    """The command line of a trainer."""
    settings = (*MODEL, *TRAIN, *ADVERSARIAL, *overrides) if trainer == "tokenizer" else (*TRAIN, *overrides)
    source = ["--preset", "smoke"] if trainer == "tokenizer" else ["--tokenizer", str(tokenizer)]
    options = ["--seed", str(SEED), "--device", "cpu", "--threads", "1", "--out", str(out)]
    return [trainer, *source, *options, *(word for s in settings for word in ("--set", s))]


def stage(trainer: str) -> TokenizerStage | VARStage:
    """The trainer's stage, without its command."""
    settings = preset("smoke", (*MODEL, *TRAIN, *ADVERSARIAL), "tokenizer")
    cpu = torch.device("cpu")
    if trainer == "tokenizer":
        return TokenizerStage(settings, notes(), cpu, SEED)
    settings = override(preset("smoke", MODEL), TRAIN, "var")
    torch.manual_seed(SEED)
    tokenizer = Tokenizer(settings).eval().requires_grad_(False)
    return VARStage(settings, notes(), tokenizer, tokens(tokenizer, settings), cpu, SEED)


def tokens(tokenizer: Tokenizer, settings: Config) -> torch.Tensor:
    return tokenize(tokenizer, settings, notes(), ALONE, lambda n: None)


def fork(function: Callable[[], Any], output: Path) -> int:
    """Run `function` in a forked process, which ends with the status of an installed command; its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        function()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """The exit status of a child; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(words: list[str]) -> Callable[[], None]:
    """mars-train with these arguments."""
    return lambda: main(words, prog_name="mars-train")


class Disk:
    """Counts the calls of this process that change the disk and strikes at one of them.

    Args:
        at: which one, from 0.
        strike: what happens at it, given the name of the call: it may end the process, raise, or return to let the call
            be done.
    """

    def __init__(self, at: int = -1, strike: Callable[[Disk, str], None] = lambda disk, call: None) -> None:
        self.at, self.strike, self.calls = at, strike, list[str]()
        self.unflushed: dict[int, int] = {}  # descriptor of each file whose bytes a power cut would take, by inode

    def reached(self, call: str) -> bool:
        """Note a call; whether it is the one to strike at."""
        self.calls.append(call)
        return len(self.calls) == self.at + 1

    def install(self) -> None:
        """From now on, in this process."""
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
            setattr(os, name, partial(self._call, name, getattr(os, name)))
        builtins.open = io.open = partial(self._open, io.open)  # type: ignore[assignment]

    def _call(self, name: str, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self.reached(name):
            self.strike(self, name)
        result = original(*arguments, **options)
        if name == "fsync":
            self.unflushed.pop(os.fstat(arguments[0]).st_ino, None)
        return result

    def _open(self, original: Callable[..., Any], file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if "b" not in mode or mode == "rb":
            return original(file, mode, *rest, **options)
        if self.reached("open"):
            self.strike(self, "open")
        return io.BufferedWriter(_File(self, file, mode.replace("b", "")))


class _File(io.FileIO):
    def __init__(self, disk: Disk, name: Any, mode: str) -> None:
        super().__init__(name, mode)
        self.disk = disk

    def write(self, data: Any) -> int:
        self.disk.unflushed.setdefault(os.fstat(self.fileno()).st_ino, os.dup(self.fileno()))
        if self.disk.reached("write"):
            super().write(memoryview(data).cast("B")[: len(data) // 2])
            self.disk.strike(self.disk, "write")
        return super().write(data) or 0


def die(disk: Disk, call: str) -> None:
    """End like a process that was killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def cut_power(disk: Disk, call: str) -> None:
    """Lose what was not flushed, and end."""
    for descriptor in disk.unflushed.values():
        os.ftruncate(descriptor, 0)
    die(disk, call)


def failing(error: int) -> Callable[[Disk, str], None]:
    """A strike that raises this `errno`."""

    def strike(disk: Disk, call: str) -> None:
        raise OSError(error, os.strerror(error))

    return strike


def flip(file: Path, rng: np.random.Generator) -> None:
    """Turn over one bit."""
    data = bytearray(file.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)


def truncate(file: Path, rng: np.random.Generator) -> None:
    """Cut the file anywhere."""
    file.write_bytes(file.read_bytes()[: rng.integers(file.stat().st_size)])


def zero(file: Path, rng: np.random.Generator) -> None:
    """Zero a block of 4 KiB, or what the file has of it."""
    data = bytearray(file.read_bytes())
    start = int(rng.integers(-(-len(data) // 4096))) * 4096
    part = data[start : start + 4096]
    data[start : start + 4096] = bytes(len(part)) if any(part) else b"\1" * len(part)  # that were zeros already
    file.write_bytes(data)


def lose(file: Path, rng: np.random.Generator) -> None:
    """Remove the file."""
    file.unlink()


def add(file: Path, rng: np.random.Generator) -> None:
    """Put a copy beside it that nobody listed."""
    file.with_name(f"extra{file.suffix}").write_bytes(file.read_bytes())


def swap(file: Path, rng: np.random.Generator) -> None:
    """Exchange it with that of the checkpoint before, or the two checkpoints."""
    before = sorted(p for p in file.parents[1].iterdir() if p.name.startswith("step-"))[-2]
    one, other = (file, before / file.name) if rng.random() < 0.8 else (file.parent, before)
    middle = one.with_name("middle")
    for source, target in ((one, middle), (other, one), (middle, other)):
        source.rename(target)


DAMAGE = {flip: 0.42, truncate: 0.3, zero: 0.15, lose: 0.05, add: 0.04, swap: 0.04}  # with their shares
