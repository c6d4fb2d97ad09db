"""The log of a run, `log.jsonl`: one line of JSON per logging step, validation and event; how it is read.

A run that goes on from an older checkpoint appends to its log and does some steps again. A line therefore cancels
the lines before it that are of a later step, or of its own step and kind.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mars.errors import ConfigError
from mars.files import read_bytes
from mars.lock import held

FILE = "log.jsonl"
LARGEST = 1 << 30  # bytes: a line for each of some million steps
JUDGED_BY = ("val_mse", "val_loss")  # the tokenizer's validation, the VAR's: the lowest is the best
ENDS = ("finished", "stopped", "diverged")  # the events that end a session

Record = dict[str, Any]


@dataclass
class Log:
    """The lines that count, in order of their steps."""

    records: list[Record] = field(default_factory=list)
    unreadable: int = 0  # lines that are not JSON, the last one excepted, which may be half written
    seconds: float = 0.0  # spent training, over all sessions
    written: float = 0.0  # when the last line was, in seconds since 1970
    locked: bool | None = None  # whether a trainer has the run folder; None where that cannot be told

    @property
    def step(self) -> int:
        """The last step logged."""
        return self.records[-1]["step"] if self.records else 0

    def series(self, name: str) -> list[tuple[int, float | None]]:
        """Return (step, value) of a number, None where it was not finite."""
        return [(r["step"], _number(r[name])) for r in self.records if name in r and _scalar(r[name])]

    def lists(self, name: str) -> list[tuple[int, list[float]]]:
        """Return (step, values) of a list of numbers, such as those per scale."""
        result = [(r["step"], r[name]) for r in self.records if isinstance(r.get(name), list)]
        return [(step, values) for step, values in result if values and None not in map(_number, values)]

    def last(self, name: str) -> Any:
        """Return the newest value of that name that is not None; None if there is none."""
        return next((r[name] for r in reversed(self.records) if r.get(name) is not None), None)

    def value(self, name: str) -> float | None:
        """Return the newest finite number of that name; None if there is none."""
        return next((v for _, v in reversed(self.series(name)) if v is not None), None)

    def best(self) -> tuple[str, int, float] | None:
        """Return (name, step, value) of the lowest validation loss."""
        entries = [(value, step, name) for name in JUDGED_BY for step, value in self.series(name) if value is not None]
        value, step, name = min(entries, default=(0.0, 0, ""))
        return (name, step, value) if name else None

    def events(self, *names: str) -> Iterator[Record]:
        """Yield the lines of these events, or of all."""
        return (r for r in self.records if "event" in r and (not names or r["event"] in names))

    def state(self) -> str:
        """Return `finished`, `stopped`, `diverged`, `running`, or `killed` if it neither ended nor goes on."""
        end = next((r["event"] for r in reversed(self.records) if r.get("event") in ("started", *ENDS)), None)
        if end in ENDS:
            return str(end)
        if self.locked is not None:
            return "running" if self.locked else "killed"
        times = [r["time"] for r in self.records[-50:] if _number(r.get("time")) is not None]
        usual = statistics.median([b - a for a, b in pairwise(times)] or [0.0])
        return "running" if time.time() - self.written < max(300, 20 * usual) else "killed"


def read_log(path: Path) -> Log:
    """Read the log of the run folder `path`; it is empty if there is none yet.

    Raises:
        ConfigError: it is there but cannot be read.
        OSError: the lock of the run cannot be read.
    """
    log, previous = Log(locked=held(path)), None
    file = path / FILE
    if not file.exists():
        return log
    *lines, torn = read_bytes(file, ConfigError, LARGEST).split(b"\n")
    for line in [*lines, torn]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            log.unreadable += line is not torn
            continue
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            log.unreadable += 1
            continue
        if (now := _number(record.get("time"))) is not None:
            if previous is not None and record.get("event") != "started":
                log.seconds += max(now - previous, 0.0)
            previous = log.written = now
        while log.records and log.records[-1]["step"] > record["step"]:
            log.records.pop()
        _drop_same(log.records, record)
        log.records.append(record)
    log.written = log.written or file.stat().st_mtime
    return log


def kind(record: Mapping[str, Any]) -> str:
    """Return "event", "validation" or "training"."""
    if "event" in record:
        return "event"
    return "validation" if any(name.startswith("val_") for name in record) else "training"


def _drop_same(records: list[Record], record: Record) -> None:
    """Drop an earlier line of the same step and kind; of events only the same event."""
    for i in range(len(records) - 1, -1, -1):
        if records[i]["step"] != record["step"]:
            return
        if kind(records[i]) == kind(record) and records[i].get("event") == record.get("event"):
            del records[i]
            return


def _scalar(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _number(value: Any) -> float | None:
    """Return the value as a finite number, or None if it is not one."""
    return float(value) if value is not None and _scalar(value) and abs(value) < 1e300 else None
