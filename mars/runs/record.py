"""Reading `run.json` of a run folder, which says what was trained on what. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

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
    origin: Mapping[str, Any] = field(default_factory=dict)  # of the dataset: kind, licence, …
    init: str = ""  # the path or name of the model that the weights start from; empty: from random ones
    init_hash: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.created <= LAST_DAY:
            raise ConfigError(f"created must be seconds since 1970, got {self.created}")


def read_record(run: Path) -> Record:
    """Read `run.json` of the run folder `run`.

    Raises:
        ConfigError: it is not a run folder, or its `run.json` is not one that mars wrote.
    """
    return from_document(Record, _content(run), run / FILE, ConfigError)


def read_document(run: Path) -> dict[str, Any]:
    """The same with everything else that `run.json` holds. Raises as `read_record`."""
    content = _content(run)
    return {**content, **asdict(from_document(Record, content, run / FILE, ConfigError))}


def _content(run: Path) -> Any:
    path = run / FILE
    if not path.exists():
        raise ConfigError(f"{run} is not a run folder (no {FILE})")
    return read_json(path, ConfigError)
