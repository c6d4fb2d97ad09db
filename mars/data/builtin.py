"""The notes that come with mars: FLAC files in NSynth's layout, rendered from FluidR3 GM (MIT licence).

`scripts/render_builtin_notes.py` makes them.
"""

from __future__ import annotations

import hashlib
import io
import json
from functools import cache
from importlib import resources

import numpy as np

from mars.data.packed import Dataset
from mars.data.splits import SPLITS
from mars.labels import CLOSED, labels_in


@cache
def load() -> Dataset:
    """Return the built-in notes, decoded into memory once (about a second, 35 MB)."""
    import soundfile

    folder = resources.files("mars").joinpath("assets", "notes")
    listing = json.loads(folder.joinpath("examples.json").read_bytes())
    notes = listing["notes"]
    instruments = sorted({note["instrument_str"] for note in notes.values()})
    rows = []
    for note in notes.values():
        labels = labels_in(note)
        numbers = (getattr(labels, name) for name in CLOSED)
        rows.append([instruments.index(labels.instrument), *numbers, SPLITS.index(note["split"])])
    metadata = np.array(rows, np.int32)
    files = (io.BytesIO(folder.joinpath("audio", f"{name}.flac").read_bytes()) for name in notes)
    quiet = np.stack([soundfile.read(file, dtype="float32")[0] for file in files])
    # The files are kept quiet to make them small; see the script.
    loud = quiet * (listing["peak"] * 32768 / np.abs(quiet).max(1, keepdims=True))
    audio = np.rint(loud).astype("<i2")
    fingerprint = hashlib.sha256(metadata.tobytes() + audio.tobytes()).hexdigest()
    return Dataset(audio, metadata, list(notes), instruments, listing["sample_rate"], fingerprint, listing["origin"])
