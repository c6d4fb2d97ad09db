"""The table of runs of `mars-train list`. It reads only JSON, so that it need not import PyTorch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mars.errors import ConfigError, MarsError
from mars.files import read_json, size_of
from mars.runs.log import JUDGED_BY, read_log
from mars.runs.record import read_record
from mars.text import printable

RUNS = Path("runs")

FIELDS = (
    *("stage", "preset", "state", "step", "steps", "loss"),
    *("validated_by", "validation", "best", "best_step", "notes_per_s", "created"),
)

COLUMNS = ("run", "stage", "preset", "state", "steps", "loss", "held out", "best", "notes/s", "size", "begun")

Summary = dict[str, Any]


def find(paths: Sequence[Path]) -> list[Path]:
    """Find the run folders among the paths, and those directly in the paths that are no runs themselves.

    Raises:
        ConfigError: a path is not a folder.
    """
    runs: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder; want run folders or a folder of them")
        if (path / "run.json").is_file():
            runs.append(path)
        else:
            runs += sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    return list(dict.fromkeys(runs))


def summaries(runs: Sequence[Path]) -> list[Summary]:
    """Summarise each run, newest first; `problem` is the reason why a run cannot be read, or None."""
    result = [summary(run) for run in runs]
    return sorted(result, key=lambda s: s["created"] or 0.0, reverse=True)


def summary(run: Path) -> Summary:
    """Return the name, stage, preset, state, steps, losses, speed and size of a run."""
    result: Summary = {"run": str(run), "problem": None, "bytes": 0, **dict.fromkeys(FIELDS)}
    if not (run / "run.json").exists():
        return {**result, "problem": "no run.json"}
    try:
        result["bytes"] = size_of(run)
        record = read_record(run)
        steps = _steps(run / "config.json", record.stage)
        log = read_log(run)
    except (MarsError, OSError) as error:
        return {**result, "problem": str(error)}
    best = log.best()
    name = best[0] if best else next((n for n in JUDGED_BY if log.series(n)), None)
    return result | {
        "stage": record.stage,
        "preset": record.preset,
        "state": log.state(),
        "step": log.step,
        "steps": steps,
        "loss": log.value("loss"),
        "validated_by": name,
        "validation": log.value(name) if name else None,
        "best": best and best[2],
        "best_step": best and best[1],
        "notes_per_s": log.value("notes_per_s"),
        "created": record.created,
    }


def _steps(path: Path, stage: str) -> int:
    """Return how many steps the settings ask for; unknown other settings are ignored."""
    try:
        steps = read_json(path, ConfigError)["train"][stage]["steps"]
    except (KeyError, TypeError):
        steps = None
    if type(steps) is not int:
        raise ConfigError(f"{path} does not say how many steps the run has")
    return steps


def table(summaries: Sequence[Summary]) -> str:
    """Format the summaries as text, a line for each run; folders that are no runs come last, with the reason."""
    good, bad = ([s for s in summaries if (s["problem"] is None) is is_run] for is_run in (True, False))
    lines = []
    if good:
        rows = [COLUMNS, *map(_row, good)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = zip(row, widths, strict=True)
            lines.append("  ".join(c.ljust(n) if i < 4 else c.rjust(n) for i, (c, n) in enumerate(cells)))
    lines += [f"{s['run']}: {s['problem']}" for s in bad]
    return "\n".join(printable(line).rstrip() for line in lines)


def _row(s: Summary) -> tuple[str, ...]:
    return (
        *(str(s[name]) for name in ("run", "stage", "preset", "state")),
        f"{s['step']:,}/{s['steps']:,}",
        *("" if s[name] is None else f"{s[name]:.4g}" for name in ("loss", "validation")),
        "" if s["best"] is None else f"{s['best']:.4g} at {s['best_step']:,}",
        "" if s["notes_per_s"] is None else f"{s['notes_per_s']:,.1f}",
        f"{s['bytes'] / 1e9:.1f} GB" if s["bytes"] >= 1e9 else f"{s['bytes'] / 1e6:.1f} MB",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(s["created"])),
    )
