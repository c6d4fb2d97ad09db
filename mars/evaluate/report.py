"""The report of an evaluation, as JSON: `metrics.<name>.value`, how each was computed, and a fingerprint of all that.

Two reports may stand in one table if their fingerprints are equal: the same definitions, settings, networks, reference
notes, numbers of notes and versions. What was evaluated is not part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mars.config import from_document
from mars.errors import DataError
from mars.files import read_json, write_atomically

FORMAT, VERSION = "mars-evaluation", 1
Profile = Literal["standard", "vinay2022"]
Mode = Literal["reconstruction", "generation"]
PROFILES: tuple[Profile, ...] = ("standard", "vinay2022")
MODES: tuple[Mode, ...] = ("reconstruction", "generation")


@dataclass(frozen=True, slots=True)
class Heading:
    """How tables show a metric."""

    label: str  # its name for people; in parentheses a network in place of the usual one
    better: Literal[-1, 0, 1] = 0  # where its better values are: lower, nowhere that is known, higher


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """The value of a metric, or the reason why there is none."""

    value: float | None = None
    reason: str = ""  # why there is no value
    low: float | None = None  # 95 % bootstrap interval of the value, over notes
    high: float | None = None
    n_real: int = 0
    n_fake: int = 0
    embedder: str = ""  # id of the network that listened
    params: Mapping[str, Any] = field(default_factory=dict)  # how it was computed; part of the fingerprint
    details: Mapping[str, Any] = field(default_factory=dict)  # further figures
    seconds: float = 0.0  # that it took, features not included


@dataclass(frozen=True, kw_only=True, slots=True)
class Sounds:
    """A set of notes that took part."""

    source: str
    notes: int
    fingerprint: str
    resampled: int = 0
    padded: int = 0
    cut: int = 0
    clipped: int = 0
    refused: tuple[tuple[str, str], ...] = ()  # files that were left out, with the reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """An evaluation: the metrics of one set of notes, and those of the baselines beside it."""

    profile: Profile
    mode: Mode
    seed: int
    metrics: Mapping[str, Figure]
    baselines: Mapping[str, Mapping[str, Figure]]  # "real-vs-real", "griffin-lim oracle", "anchor"
    sets: Mapping[str, Sounds]  # real, fake, train
    embedders: Mapping[str, Mapping[str, Any]]  # by id: sha256, front_end, accuracy
    versions: Mapping[str, str]
    device: str
    threads: int
    created: str  # ISO 8601
    seconds: float
    produced: Mapping[str, Any] = field(default_factory=dict)  # how the fake notes were made, where mars made them
    table: Mapping[str, Heading] = field(default_factory=dict)  # of the metrics, in their order; older reports lack it

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything that decides the figures but the notes that are evaluated."""
        return {
            "version": VERSION,
            "profile": self.profile,
            "mode": self.mode,
            "seed": self.seed,
            "metrics": {
                name: {"n_real": m.n_real, "n_fake": m.n_fake, "embedder": m.embedder, **m.params}
                for name, m in self.metrics.items()
                if m.value is not None
            },
            "sets": {name: s.fingerprint for name, s in self.sets.items() if name != "fake"},
            "embedders": {name: {key: e[key] for key in ("sha256", "front_end")} for name, e in self.embedders.items()},
            "versions": dict(self.versions),
        }

    @property
    def fingerprint(self) -> str:
        """Hex sum of `protocol`."""
        return hashlib.sha256(json.dumps(self.protocol, sort_keys=True).encode()).hexdigest()


def document(report: Report) -> dict[str, Any]:
    """The report as JSON values, as `write` writes them."""
    document = {"format": FORMAT, "version": VERSION, **asdict(report)}
    document |= {"protocol": report.protocol, "fingerprint": report.fingerprint}
    for row in (document["metrics"], *document["baselines"].values()):
        for name, metric in row.items():
            row[name] = {key: value for key, value in metric.items() if key == "value" or value not in (None, "", {})}
    return document


def write(path: Path, report: Report) -> None:
    """The report as JSON. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(document(report), indent=1, allow_nan=False) + "\n").encode())


def read(path: Path) -> Report:
    """Read the report in a file that `write` made.

    Raises:
        DataError: it is missing or something else.
    """
    content = read_json(path, DataError)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} is not a report of mars-eval; want the JSON file that it writes")
    if content.get("version") != VERSION:
        raise DataError(f"{path}: want {FORMAT} version {VERSION}, got {content.get('version')}; evaluate again")
    _without_points(content)
    report = from_document(Report, content, path, DataError)
    if not {"real", "fake"} <= report.sets.keys():
        raise DataError(f"{path} is damaged (it lacks the real or the evaluated notes); evaluate again")
    try:
        report.fingerprint  # noqa: B018  # of what all embedders must say
    except KeyError as error:
        raise DataError(f"{path} is damaged (an embedder lacks {error}); evaluate again") from None
    return report


def _without_points(content: Any) -> None:
    """Take out of an older report the intervals that are not of the value shown, and what they are of."""
    rows = [content.get("metrics"), *(v for v in [content.get("baselines")] if isinstance(v, dict) for v in v.values())]
    for metric in [m for row in rows if isinstance(row, dict) for m in row.values() if isinstance(m, dict)]:
        if metric.pop("point", None) is not None:
            metric.pop("low", None), metric.pop("high", None)
