"""What every source of notes shares: audio of one length, and the check of a note."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Audio = npt.NDArray[np.float32]  # (samples,), 1.0 is full scale

SILENT = 1e-4  # a note whose peak stays below this is taken for silence
SHORTEST = 0.1  # s; shorter files are taken for rubbish


def fit(audio: Audio, samples: int) -> Audio:
    """Cut audio of any length to (samples,), or pad it with zeros at its end."""
    cut = audio[:samples].astype(np.float32, copy=False)
    return np.pad(cut, (0, samples - len(cut)))


def fault(audio: Audio) -> str | None:
    """Return the reason why this audio cannot be used as a note, or None if it can."""
    if not np.isfinite(audio).all():
        return "holds NaN or infinite samples"
    peak = float(np.abs(audio).max(initial=0.0))
    return f"silent (peak {peak:.1e})" if peak < SILENT else None
