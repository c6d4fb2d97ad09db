"""What a dataset holds, in figures and words: for people who look, and for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mars.data.decode import CHANGES
from mars.data.packed import Dataset, left_out
from mars.data.splits import SPLITS
from mars.labels import FAMILIES


def summary(dataset: Dataset, path: Path | None) -> dict[str, Any]:
    """JSON values: counts by split and family, the range of pitches, what was done to the notes and what was left out.

    Args:
        path: where it lies; None: the built-in notes.
    """
    family, split, pitch = (dataset.column(name) for name in ("family", "split", "pitch"))
    known, packing = pitch[pitch >= 0], dataset.packing
    families = {
        name: {of: int(((family == i) & (split == j)).sum()) for j, of in enumerate(SPLITS)}
        for i, name in [*enumerate(dataset.words.get("family", FAMILIES)), (-1, "unknown")]
    }
    return {
        "path": None if path is None else str(path),
        "notes": len(dataset),
        "instruments": len(dataset.instruments),
        "splits": {of: int((split == j).sum()) for j, of in enumerate(SPLITS)},
        "families": {name: counts for name, counts in families.items() if sum(counts.values())},
        "pitch": [int(known.min()), int(known.max())] if len(known) else None,
        "sample_rate": dataset.sample_rate,
        "samples": dataset.samples,
        "seconds": dataset.samples / dataset.sample_rate,
        "held_out": packing.held_out,
        "changes": {change: packing.changes[change] for change in CHANGES if packing.changes.get(change)},
        "left_out": {} if path is None else dict(left_out(path).most_common()),
        "ignored": dict(sorted(packing.ignored.items())),
        "origin": {key: value for key, value in dataset.origin.items() if isinstance(value, str | int)},
        "fingerprint": dataset.fingerprint,
    }
