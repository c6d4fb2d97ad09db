"""The run folder: its log, its checkpoints, and the models exported from it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mars
from mars import checkpoint
from mars.config import from_document
from mars.errors import CheckpointError, ConfigError, DiskError, Diverged
from mars.files import size_of, write_atomically
from mars.model import Model
from mars.runs import card
from mars.runs.distributed import ALONE, World
from mars.runs.log import JUDGED_BY
from mars.runs.record import read_document
from mars.runs.stage import Stage

FORMAT = 1  # of state.json
VERSIONS = {
    "mars": mars.__version__,
    "torch": torch.__version__,
    "numpy": np.__version__,
    "python": platform.python_version(),
}


@dataclass(frozen=True)
class Best:
    """The best validation so far."""

    step: int
    metric: str
    value: float


@dataclass
class Position:
    """How far a run has come."""

    step: int = 0  # steps done
    skipped: int = 0  # those of them that were not finite and changed nothing
    best: Best | None = None

    def improves(self, values: Mapping[str, Any]) -> bool:
        """Return whether a validation at this step is the best so far, and record it if so."""
        metric = next((name for name in JUDGED_BY if name in values), None)
        if metric is None or not values[metric] < (self.best.value if self.best else float("inf")):
            return False
        self.best = Best(self.step, metric, values[metric])
        return True


@dataclass
class RunFolder:
    """A run folder: `run.json`, `config.json`, `log.jsonl`, `checkpoints/`, `model/`, `best/` and `best.json`.

    Args:
        path: where it is.
        identity: JSON values that every checkpoint must agree with: settings, seed, data, tokenizer.
    """

    path: Path
    identity: Mapping[str, Any] = field(default_factory=dict)
    world: World = ALONE
    threads: int = field(default_factory=torch.get_num_threads)  # of this session
    tokenizer_card: str = ""  # of a VAR's tokenizer
    _judged: Mapping[str, Any] | None = None  # the last regular validation; None: not looked up in the log yet

    @property
    def surroundings(self) -> dict[str, Any]:
        """What decides the last bits of a step besides the run itself, such as versions; checkpoints record it."""
        return {**VERSIONS, "device": self.world.device.type, "threads": self.threads}

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line of JSON.

        Raises:
            DiskError: it cannot be written.
        """
        if not self.world.main:
            return
        train = self._train
        if train is not None and "step" in record and card.regular(record, train["validate_every"], train["steps"]):
            self._judged = dict(record)
        path = self.path / "log.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({k: None if v != v else v for k, v in record.items()}) + "\n")
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror or error}; make room and go on with the same command") from error

    def rewind(self, step: int) -> None:
        """Drop the lines of the log that are damaged or of steps after `step`, which are done again."""
        path = self.path / "log.jsonl"
        if not self.world.main or not path.is_file():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        lines_kept = [line for line in lines if line.endswith(b"\n") and _step(line) <= step]
        if lines_kept != lines:
            write_atomically(path, b"".join(lines_kept), durable=True)

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints' folders, newest first."""
        folders = (self.path / "checkpoints").glob("step-*")
        return sorted((p for p in folders if p.name[5:].isdigit()), reverse=True)

    def recover(self) -> None:
        """Clean up after a killed trainer; only for the process that holds the folder's lock."""
        for folder in (self.path, self.path / "checkpoints"):
            checkpoint.recover(folder)

    def space_needed(self, stage: Stage) -> int:
        """Return the bytes that the run will take on the disk at most, beyond what its folder holds already.

        That is `train.keep` checkpoints, the best one and the one being written, before the first step.
        """
        held = sum(size_of(self.path / name) for name in ("checkpoints", "model", "best"))
        return max(checkpoint_size(stage) * (stage.train.keep + 2) - held, 0)

    def save(self, position: Position, stage: Stage) -> None:
        """Export `model/` and, if this step is the best, `best/`; write the checkpoint; drop those not kept.

        The newest `train.keep` checkpoints and the best one are kept.

        Raises:
            Diverged: a tensor is not finite; nothing is written.
            DiskError: something cannot be written; the older checkpoints stay as they are.
        """
        state = {name: self.world.gather(tensors) for name, tensors in stage.state().items()}  # each gives its part
        _check_finite(state, position.step, self.path)
        target = self.path / "checkpoints" / f"step-{position.step:08d}"
        best, model = position.best, stage.snapshot()
        if model is None:
            return
        model.card = self._card(model, position.step)
        try:
            model.save(self.path / "model")
            if best is not None and best.step == position.step:
                model.save(self.path / "best")
            document = {"format": FORMAT, **asdict(position), **self.identity, "versions": self.surroundings}
            checkpoint.replace_directory(target, state, {"state": document})  # there may be a damaged one
            if best is not None and best.step == position.step:
                self._note_best(best)
            existing = self.checkpoints()  # those of later steps are damaged, or the run would have gone on from them
            kept = [path for path in existing if path.name <= target.name][: stage.train.keep]
            for path in existing:
                if path not in kept and (best is None or path.name != f"step-{best.step:08d}"):
                    checkpoint.remove_directory(path)
        except OSError as error:
            raise DiskError(
                f"step {position.step} could not be saved in {target} ({_bytes(state):,} bytes): "
                f"{error.strerror or error}; older checkpoints are as they were; "
                "make room and go on with the same command"
            ) from error

    @property
    def _train(self) -> Mapping[str, Any] | None:
        """The settings of the training, where they are known."""
        config, stage = self.identity.get("config"), self.identity.get("stage")
        return config["train"][stage] if config and stage else None

    def _card(self, model: Model, step: int) -> str:
        """The card of the run's model; empty for a folder that is no run's."""
        train = self._train
        if train is None or not (self.path / "run.json").is_file():
            return ""
        if self._judged is None:
            self._judged = card.last_validation(self.path, step, train["validate_every"], train["steps"])
        record = read_document(self.path)
        return card.made(record, model.config, step, self._judged, model.parameters, self.tokenizer_card)

    def restore(self, stage: Stage, say: Callable[[str], None]) -> Position:
        """Load the newest intact checkpoint, and return how far the run was then; without one it is at its start.

        Raises:
            CheckpointError: there are checkpoints but none is intact, or the newest intact one does not fit.
        """
        problem: CheckpointError | None = None
        for path in self.checkpoints():
            try:
                checkpoint.verify(path)
                document = checkpoint.read_json(path / "state.json")
                position = _position(document, path)
                names = [p.stem for p in path.glob("*.safetensors")]
                state = {n: checkpoint.read_tensors(path / f"{n}.safetensors") for n in names}
            except CheckpointError as error:
                problem = error
                say(f"warning: {error}; trying the checkpoint before it")
                continue
            self._check_identity(document, path)
            stage.load_state(state, path)
            known, here = document.get("versions", {}), self.surroundings
            if self.world.device.type != "cpu":
                del here["threads"]
            # Older checkpoints do not have all of it.
            others = [f"{name} {known[name]}, not {own}" for name, own in here.items() if known.get(name, own) != own]
            if others:
                say(f"warning: {path} was written with {'; '.join(others)}; going on may not be exact to the bit")
            if self.world.main and position.best is not None and position.best.step == position.step:
                self._note_best(position.best)  # which a kill right after the save may have prevented
            return position
        if problem is not None:
            raise CheckpointError(f"no usable checkpoint in {self.path / 'checkpoints'}; the last problem: {problem}")
        return Position()

    def _note_best(self, best: Best) -> None:
        data = (json.dumps(asdict(best), indent=1) + "\n").encode()
        path = self.path / "best.json"
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data, durable=True)

    def _check_identity(self, document: Mapping[str, Any], path: Path) -> None:
        for key, expected in self.identity.items():
            problem = difference(document.get(key), expected, key)
            if problem is not None:
                raise CheckpointError(f"{path} is of another run: {problem}")


def checkpoint_size(stage: Stage) -> int:
    """Estimate a checkpoint's bytes from what the stage holds before its first step, and a tenth for the exports.

    The first step adds two moments of everything but the EMA: a checkpoint is then twice what the stage held.
    """
    sizes = {group: _bytes({group: tensors}) for group, tensors in stage.state().items()}
    return int(1.1 * sum(size if group == "averaged" else 3 * size for group, size in sizes.items()))


def _bytes(state: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(tensor.nbytes for tensors in state.values() for tensor in tensors.values())


def _step(line: bytes) -> float:
    """Return the step of a line of the log; infinite if it is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return float("inf")


def _check_finite(state: Mapping[str, Mapping[str, Tensor]], step: int, path: Path) -> None:
    for group, tensors in state.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise Diverged(
                    f"{name} of {group} is not finite after step {step}, which is not saved; "
                    f"what is in {path / 'checkpoints'} is; lower train.lr in a new run"
                )


@dataclass(frozen=True, kw_only=True)
class _State:
    """The part of state.json that is needed to resume."""

    format: int
    step: int
    skipped: int
    best: Best | None
    versions: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ConfigError(f"want format {FORMAT}, got {self.format}")
        if min(self.step, self.skipped) < 0:
            raise ConfigError(f"step and skipped must not be negative, got {self.step} and {self.skipped}")


def _position(document: Any, path: Path) -> Position:
    """Read the position in state.json. Raises `CheckpointError` if it cannot be that of `path`."""
    state = from_document(_State, document, path / "state.json", CheckpointError)
    if path.name != f"step-{state.step:08d}":
        raise CheckpointError(f"{path} holds step {state.step}; it was renamed")
    return Position(state.step, state.skipped, state.best)


def difference(actual: Any, expected: Any, where: str) -> str | None:
    """Describe the first value of `expected` that differs in `actual`, if any; keys that `actual` lacks are ignored."""
    if isinstance(actual, dict) and isinstance(expected, dict):
        parts = (difference(actual[k], v, f"{where}.{k}") for k, v in expected.items() if k in actual)
        return next((part for part in parts if part is not None), None)
    return None if actual == expected else f"{where} is {actual}, not {expected}"
