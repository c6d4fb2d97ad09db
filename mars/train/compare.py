"""Runs side by side: `mars-train list`. Reads JSON alone, so that it need not wait for PyTorch."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mars.errors import ConfigError
from mars.train.log import BEST, read_log

RUNS = Path("runs")

FIELDS = (
    *("stage", "preset", "state", "step", "steps", "loss"),
    *("validated_by", "validation", "best", "best_step", "notes_per_s", "created"),
)

COLUMNS = ("run", "stage", "preset", "state", "steps", "loss", "held out", "best", "notes/s", "size", "begun")

Summary = dict[str, Any]


def find(paths: Sequence[Path]) -> list[Path]:
    """The run folders among the paths, and those right under the ones that are no runs themselves.

    Raises:
        ConfigError: a path is not a folder.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder; want run folders or a folder of them")
        if (path / "run.json").is_file():
            found.append(path)
        else:
            found += sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    return list(dict.fromkeys(found))


def summaries(runs: Sequence[Path]) -> list[Summary]:
    """What is known of each run, newest first; `problem` is why nothing more is, or None."""
    found = [summary(run) for run in runs]
    return sorted(found, key=lambda s: s["created"] or 0.0, reverse=True)


def summary(run: Path) -> Summary:
    """Name, stage, preset, state, steps, losses, speed and size of a run."""
    found: Summary = {"run": str(run), "problem": None, "bytes": _size(run), **dict.fromkeys(FIELDS)}
    try:
        record, settings = (_object(run / name) for name in ("run.json", "config.json"))
        log = read_log(run)
        stage, created = record["stage"], record["created"]
        steps = settings["train"][stage]["steps"]
        if not isinstance(created, (int, float)) or not isinstance(steps, int):
            raise ValueError("run.json or config.json is not of a run")
    except (KeyError, TypeError) as error:
        return {**found, "problem": f"run.json or config.json is not of a run: {type(error).__name__} {error}"}
    except (OSError, ValueError, RecursionError) as error:
        return {**found, "problem": str(error)}
    best = log.best()
    name = best[0] if best else next((n for n in BEST if log.series(n)), None)
    return found | {
        "stage": stage,
        "preset": record.get("preset"),
        "state": log.state(),
        "step": log.step,
        "steps": steps,
        "loss": log.last("loss"),
        "validated_by": name,
        "validation": log.last(name) if name else None,
        "best": best and best[2],
        "best_step": best and best[1],
        "notes_per_s": log.last("notes_per_s"),
        "created": created,
    }


def table(found: Sequence[Summary]) -> str:
    """The summaries as lines of text, a run each; what is no run comes last, with the reason."""
    good, bad = ([s for s in found if (s["problem"] is None) is is_run] for is_run in (True, False))
    lines = []
    if good:
        rows = [COLUMNS, *map(_row, good)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = zip(row, widths, strict=True)
            lines.append("  ".join(c.ljust(n) if i < 4 else c.rjust(n) for i, (c, n) in enumerate(cells)))
    lines += [f"{s['run']}: {s['problem']}" for s in bad]
    return "\n".join("".join(c if c.isprintable() else "?" for c in line).rstrip() for line in lines)


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


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return found


def _size(run: Path) -> int:
    """Bytes of all files; what vanishes meanwhile counts as nothing."""
    total = 0
    for path in run.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
