"""Reading `run.json` of a run folder, which says what was trained on what. Needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mars.config import from_document
from mars.errors import ConfigError
from mars.files import read_json

FILE = "run.json"
LAST_DAY = 253_402_300_799.0  # seconds from 1970 to the end of the year 9999, which no calendar here goes beyond


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The content of `run.json`; an older one may lack the fields that have a default."""

    stage: Literal["tokenizer", "var"]
    preset: str
    created: float  # seconds since 1970
    seed: int = 0
    data: str = ""  # fingerprint of the dataset
    notes: int = 0
    train_notes: int = 0
    tokenizer: str = ""  # of a VAR: the path of what it is trained on
    tokenizer_hash: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.created <= LAST_DAY:
            raise ConfigError(f"created must be seconds since 1970, got {self.created}")


def read_record(run: Path) -> Record:
    """Read `run.json` of the run folder `run`.

    Raises:
        ConfigError: it is not a run folder, or its `run.json` is not one that mars wrote.
    """
    path = run / FILE
    if not path.exists():
        raise ConfigError(f"{run} is not a run folder (no {FILE})")
    return from_document(Record, read_json(path, ConfigError), path, ConfigError)
