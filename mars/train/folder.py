"""The run folder: its log and its checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mars import checkpoint
from mars.errors import CheckpointError
from mars.train.stage import Stage
from mars.train.world import ALONE, World

KEEP = 3  # checkpoints kept per run


@dataclass
class RunFolder:
    """A run folder: `run.json`, `config.json`, `log.jsonl`, `checkpoints/`, and the exported `model/`."""

    path: Path
    world: World = ALONE

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line of JSON."""
        if not self.world.main:
            return
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: None if v != v else v for k, v in record.items()}) + "\n")

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        found = (self.path / "checkpoints").glob("step-*")
        return sorted((p for p in found if p.name[5:].isdigit()), reverse=True)

    def save(self, step: int, stage: Stage) -> None:
        """Write the checkpoint of `step`, to which every process contributes, and drop all but the newest `KEEP`."""
        state = {name: self.world.whole(tensors) for name, tensors in stage.state().items()}  # each gives its part
        if not self.world.main:
            return
        target = self.path / "checkpoints" / f"step-{step:08d}"
        checkpoint.replace_directory(target, state, {"state": {"step": step}})  # there may be a damaged one
        for old in self.checkpoints()[KEEP:]:
            doomed = old.with_name(f".del-{old.name}")
            old.rename(doomed)
            shutil.rmtree(doomed)

    def restore(self, stage: Stage, say: Callable[[str], None]) -> int:
        """Load the newest checkpoint that is intact; the number of steps done, 0 without one.

        Raises:
            CheckpointError: there are checkpoints but none can be used.
        """
        problem: CheckpointError | None = None
        for path in self.checkpoints():
            try:
                checkpoint.verify(path)
                step = int(checkpoint.read_json(path / "state.json")["step"])
                names = [p.stem for p in path.glob("*.safetensors")]
                state = {n: checkpoint.read_tensors(path / f"{n}.safetensors") for n in names}
            except CheckpointError as error:
                problem = error
                say(f"warning: {error}; trying the checkpoint before it")
                continue
            stage.load_state(state, path)
            return step
        if problem is not None:
            raise CheckpointError(f"no usable checkpoint in {self.path / 'checkpoints'}; the last problem: {problem}")
        return 0
