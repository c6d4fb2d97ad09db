"""Notes of a model to evaluate: reconstructions of real notes, and new ones that are asked for the same labels.

Both fill a `mars.notes.NoteFolder`, which goes on where it was interrupted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mars import audio
from mars.errors import CheckpointError, ConfigError
from mars.evaluate.baselines import phases
from mars.evaluate.sets import NoteSet
from mars.evaluate.sets import stem as stem_of
from mars.labels import CLOSED, Values
from mars.model import Model
from mars.models.sampling import tile_size
from mars.notes import Filled, Note, NoteFolder, fill, stem

Progress = Callable[[int, int], None]  # called with the notes that are there and all of them


def reconstruct(
    model: Model,
    notes: NoteSet,
    out: Path,
    *,
    iterations: int = 32,
    refine: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Encode and decode every note, into files that pair up with the notes (`mars.evaluate.sets.pair`).

    The phases that Griffin-Lim starts from depend on the seed and the note's sound alone. A note that gets beyond full
    scale is made quieter, not clipped.

    Returns:
        `model_hash`; `settings`; `quieter`: how many notes are at full scale, as those made quieter are.

    Raises:
        CheckpointError: what the model decodes is not finite.
        ConfigError: a setting is below 0, or `out` was begun with others.
        DataError: two notes have one id, a file has changed or gone, or something else is in `out`.
        DiskError: there is no room for the files.
    """
    _not_negative(iterations=iterations, refine=refine, seed=seed)
    notes.by_id()
    settings = {"made": "reconstructions", "of": notes.fingerprint, "iterations": iterations, "seed": seed}
    if refine:
        settings["refine"] = refine
    files = [f"{stem_of(name)}.wav" for name in notes.names]
    labels = [_labels(notes, i, CLOSED) for i in range(len(notes))]
    size, samples = tile_size(model.device), model.config.audio.samples
    with fill(_folder(model, out, settings, files, labels)) as folder:
        missing = set(folder.missing)
        for first in range(0, len(notes), size):  # in whole tiles, for the reason that `mars.model` gives
            rows = range(first, min(first + size, len(notes)))
            if not missing.isdisjoint(rows):
                tile = [*rows, *[first] * (size - len(rows))]
                waveforms = notes.waveforms(tile, model.config.audio.sample_rate, samples)
                ids = model.encode(waveforms, refine=refine)
                streams = phases([notes.keys[i] for i in tile], seed)
                decoded = audio.within_full_scale(model.decode(ids, iterations=iterations, seed=streams).cpu())
                for i, waveform in zip(rows, decoded, strict=False):
                    if not bool(waveform.isfinite().all()):
                        raise CheckpointError(f"{notes.names[i]} is not finite; the model's weights are unusable")
                    if i in missing:
                        folder.add(i, waveform)
            if progress is not None:
                progress(rows.stop, len(notes))
        return _produced(model, settings, folder.finish())


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
    (`mars.labels.Ranges.takes`) is left open, as is one that is not known.

    Args:
        seed, cfg, top_k, top_p, iterations: as for `mars.model.Model.iterate`.

    Returns:
        `model_hash`; `settings`; `left_open`: how many labels of each kind the model could not be asked for;
        `untrained`: how many it was asked for, but was not trained on, as far as is known;
        `quieter`: how many notes are at full scale, as those made quieter are.

    Raises:
        CheckpointError: the model is a tokenizer only, or gives numbers that are not finite.
        ConfigError: a setting is out of range, or `out` was begun with others.
        DataError: something else is in `out`.
        DiskError: there is no room for the files.
    """
    _not_negative(seed=seed)
    real = real.shuffled(seed)
    ranges = model.ranges
    labels = [_labels(real, i % len(real), ranges.names) for i in range(n)]
    taken = [{name: value for name, value in note.items() if ranges.takes(name, value)} for note in labels]
    refused = Counter(name for note, t in zip(labels, taken, strict=True) for name in note.keys() - t.keys())
    conditions = [ranges.accepted(note, allow_untrained=True) for note in taken]
    untrained = Counter(name for condition in conditions if (name := ranges.untrained(condition)))
    drawn: dict[str, Any] = {"seed": seed, "cfg": cfg, "top_k": top_k, "top_p": top_p, "iterations": iterations}

    def generated(start: int, stop: int) -> Iterator[Note]:
        chosen = conditions[start:stop]
        return model.iterate(stop - start, start=start, conditions=chosen, allow_untrained=True, **drawn)

    generated(0, n)  # for its checks, before anything is written
    settings = {"made": "new notes", "n": n, **drawn, "like": real.fingerprint}
    files = [f"{stem(i, n, condition)}.wav" for i, condition in enumerate(conditions)]
    with fill(_folder(model, out, settings, files, conditions)) as folder:
        done = n - len(folder.missing)
        for start, stop in folder.runs():
            for note in generated(start, stop):
                folder.add(note.index, note.waveform)
                done += 1
                if progress is not None:
                    progress(done, n)
        produced = _produced(model, settings, folder.finish())
    return {**produced, "left_open": dict(sorted(refused.items())), "untrained": dict(sorted(untrained.items()))}


def _folder(
    model: Model, out: Path, settings: Mapping[str, Any], files: Sequence[str], conditions: Sequence[Mapping[str, Any]]
) -> NoteFolder:
    return NoteFolder(out, {**model.record, **settings}, files, conditions, model.config.audio)


def _produced(model: Model, settings: Mapping[str, Any], filled: Filled) -> dict[str, Any]:
    """Return the part of the result that both functions share."""
    return {"model_hash": model.hash, "settings": dict(settings), "quieter": filled.full_scale}


def _labels(notes: NoteSet, i: int, names: Sequence[str]) -> Values:
    """Return those of these labels that are known of a note."""
    return {name: notes.labels[i][name] for name in names if name in notes.labels[i]}


def _not_negative(**settings: int) -> None:
    for name, value in settings.items():
        if value < 0:
            raise ConfigError(f"{name} must be at least 0, got {value}")
