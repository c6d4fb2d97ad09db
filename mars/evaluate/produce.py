"""Notes of a model to evaluate: reconstructions of real notes, and new ones that are asked for the same labels.

They are 16-bit WAV files in a folder, with the `notes.json` of mars-generate. That is written first and lists every
file, so that the folder cannot be taken for a whole set before it is one, and the same call goes on where it was
interrupted, while any other is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mars import audio
from mars.config import CLASSES, FAMILIES, SOURCES
from mars.errors import CheckpointError, ConfigError, DataError
from mars.evaluate.baselines import phases
from mars.evaluate.notes import SAMPLE_RATE, NoteSet
from mars.evaluate.notes import stem as stem_of
from mars.files import read_json, sha256, write_atomically
from mars.generate import Condition, Note, accepted, generate, listing, stem, takes, tile_size
from mars.model import Model
from mars.runtime import autocast, free_space

LISTING = "notes.json"
HEADER = 44  # bytes of a WAV file before its samples
Progress = Callable[[int, int], None]  # called with the notes that are there and all of them


def reconstruct(
    model: Model, notes: NoteSet, out: Path, *, iterations: int = 32, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Encode and decode every note, into files that pair up with the notes (`mars.evaluate.notes.pair`).

    The phases that Griffin-Lim starts from depend on the seed and the note's sound alone. A note that gets beyond full
    scale is made quieter, not clipped.

    Returns:
        `model_hash`; `settings`; `quieter`: how many notes are at full scale, as those made quieter are.

    Raises:
        CheckpointError: what the model decodes is not finite.
        ConfigError: the model is not at 16 kHz, a setting is below 0, or `out` was begun with others.
        DataError: two notes have one id, a file has changed or gone, or something else is in `out`.
        DiskError: there is no room for the files.
    """
    _not_negative(iterations=iterations, seed=seed)
    notes.by_id()
    settings = {"made": "reconstructions", "of": notes.fingerprint, "iterations": iterations, "seed": seed}
    files = [f"{stem_of(name)}.wav" for name in notes.names]
    folder = _Folder(model, out, settings, files, [_labels(notes, i) for i in range(len(notes))])
    missing = set(folder.begin())
    size = tile_size(model.device)
    for first in range(0, len(notes), size):  # in whole tiles, for the reason that `mars.generate` gives
        rows = range(first, min(first + size, len(notes)))
        if not missing.isdisjoint(rows):
            tile = [*rows, *[first] * (size - len(rows))]
            with autocast(model.device, "auto"):
                ids = model.encode(notes.waveforms(tile))
            streams = phases([notes.keys[i] for i in tile], seed)
            decoded = audio.within_full_scale(model.decode(ids, iterations=iterations, seed=streams).cpu())
            for i, waveform in zip(rows, decoded, strict=False):
                if not bool(waveform.isfinite().all()):
                    raise CheckpointError(f"{notes.names[i]} is not finite; the model's weights are unusable")
                if i in missing:
                    folder.add(i, waveform)
        if progress is not None:
            progress(rows.stop, len(notes))
    return folder.finish()


def generate_like(
    model: Model,
    real: NoteSet,
    n: int,
    out: Path,
    *,
    seed: int = 0,
    cfg: float = 2.0,
    top_k: int = 900,
    top_p: float = 0.96,
    iterations: int = 32,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Generate n notes, each asked for the labels of a real one: all of them in a random order, again and again.

    The order depends on the seed and the real notes alone. A label that the model cannot be asked for
    (`mars.generate.takes`) is left open, as is one that is not known.

    Args:
        seed, cfg, top_k, top_p, iterations: as for `mars.generate.generate`.

    Returns:
        `model_hash`; `settings`; `left_open`: how many labels of each kind the model could not be asked for;
        `quieter`: how many notes are at full scale, as those made quieter are.

    Raises:
        CheckpointError: the model is a tokenizer only, or gives numbers that are not finite.
        ConfigError: the model is not at 16 kHz, a setting is out of range, or `out` was begun with others.
        DataError: something else is in `out`.
        DiskError: there is no room for the files.
    """
    _not_negative(seed=seed)
    real = real.shuffled(seed)
    labels = [_labels(real, i % len(real)) for i in range(n)]
    taken = [{name: value for name, value in note.items() if takes(model, name, value)} for note in labels]
    refused = Counter(name for note, t in zip(labels, taken, strict=True) for name in note.keys() - t.keys())
    conditions = [accepted(model, note) for note in taken]
    drawn: dict[str, Any] = {"seed": seed, "cfg": cfg, "top_k": top_k, "top_p": top_p, "iterations": iterations}

    def generated(start: int, stop: int) -> Iterator[Note]:
        return generate(model, stop - start, start=start, conditions=conditions[start:stop], **drawn)

    generated(0, n)  # for its checks, before anything is written
    settings = {"made": "new notes", "n": n, **drawn, "like": real.fingerprint}
    files = [f"{stem(i, n, condition)}.wav" for i, condition in enumerate(conditions)]
    folder = _Folder(model, out, settings, files, conditions)
    missing = folder.begin()
    done = n - len(missing)
    for start, stop in _runs(missing):
        for note in generated(start, stop):
            folder.add(note.index, note.waveform)
            done += 1
            if progress is not None:
                progress(done, n)
    return {**folder.finish(), "left_open": dict(sorted(refused.items()))}


class _Folder:
    """A folder of notes that is being filled, or was."""

    def __init__(
        self,
        model: Model,
        path: Path,
        settings: Mapping[str, Any],
        files: Sequence[str],
        conditions: Sequence[Condition],
    ) -> None:
        config = model.config.audio
        if config.sample_rate != SAMPLE_RATE:
            raise ConfigError(f"notes are evaluated at {SAMPLE_RATE} Hz; the model's are at {config.sample_rate} Hz")
        self.path, self.files, self.settings = path, files, dict(settings)
        self.bytes = HEADER + 2 * config.samples  # of each file
        notes = [
            {"index": i, "file": files[i], "condition": dict.fromkeys(CLASSES) | c} for i, c in enumerate(conditions)
        ]
        self.document = listing(model, settings, notes)

    def begin(self) -> list[int]:
        """Make the folder ready, or see that it is the one; the places of the notes that are not there."""
        begun = (self.path / LISTING).is_file()
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.path} is not a folder; name a new one")
        known = {LISTING, *self.files} if begun else set()
        if begun:
            self._check()
        if self.path.is_dir():
            strange = sorted(f.name for f in self.path.iterdir() if f.name not in known and not f.name.startswith("."))
            if strange:
                raise DataError(f"{self.path} holds {strange[0]}, which is none of these notes; name a new folder")
        missing = [i for i, file in enumerate(self.files) if not self._complete(self.path / file)]
        free_space(self.path, len(missing) * (self.bytes + 1024) + 2**20)
        if not begun:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write()
        return missing

    def add(self, place: int, waveform: Tensor) -> None:
        audio.write_wav(self.path / self.files[place], waveform, SAMPLE_RATE)

    def finish(self) -> dict[str, Any]:
        """Put the sums of the files in the listing; what both functions return."""
        quieter = 0
        for note in self.document["notes"]:
            file = self.path / note["file"]
            note["sha256"] = sha256(file)
            samples = np.fromfile(file, "<i2", offset=HEADER)
            quieter += int(samples.max()) == 32767 or int(samples.min()) == -32768
        self._write()
        return {"model_hash": self.document["model_hash"], "settings": self.settings, "quieter": quieter}

    def _check(self) -> None:
        """Raise an error unless the listing that is there is of this call."""
        file = self.path / LISTING
        there = read_json(file, DataError)
        try:
            there["notes"] = [{k: v for k, v in note.items() if k != "sha256"} for note in there["notes"]]
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{file} is not one that mars wrote; name a new folder") from None
        for name, value in self.document.items():
            if there.get(name) != value:
                differs = "other notes" if name == "notes" else f"{name} {there.get(name)}, not {value}"
                raise ConfigError(f"{self.path} was begun with {differs}; name a new folder")

    def _complete(self, file: Path) -> bool:
        return file.is_file() and file.stat().st_size == self.bytes

    def _write(self) -> None:
        write_atomically(self.path / LISTING, (json.dumps(self.document, indent=1) + "\n").encode())


def _labels(notes: NoteSet, i: int) -> Condition:
    """What is known of a note, as a condition without the rest."""
    known = {
        "family": (notes.family, FAMILIES),
        "source": (notes.instrument_source, SOURCES),
        "pitch": (notes.pitch, range(128)),
        "velocity": (notes.velocity, range(128)),
    }
    return {name: values[int(column[i])] for name, (column, values) in known.items() if column[i] >= 0}


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rising numbers as stretches without a gap: first, and one past the last."""
    for _, pairs in groupby(enumerate(places), lambda pair: pair[1] - pair[0]):
        stretch = [place for _, place in pairs]
        yield stretch[0], stretch[-1] + 1


def _not_negative(**settings: int) -> None:
    for name, value in settings.items():
        if value < 0:
            raise ConfigError(f"{name} must be at least 0, got {value}")
