"""Pitch accuracy: whether a note has the pitch that was asked for, as a network hears it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mars.errors import ConfigError, DataError
from mars.evaluate.bootstrap import bootstrap_mean
from mars.evaluate.embedders.roles import Role
from mars.evaluate.metrics.measure import Measure, Metric, Row, figure
from mars.evaluate.report import Figure

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PitchAccuracy:
    """Shares of the notes whose requested pitch is known and among the classes."""

    accuracy: float  # the very semitone
    chroma: float  # the same name in any octave
    octave_errors: float  # the right name in another octave
    semitone_errors: float  # a semitone above or below
    notes: int  # what these are shares of
    unknown: int  # notes left out because nobody said what pitch they should have
    outside: int  # notes left out because the network has no class for their pitch


def detected(logits: Tensor, classes: Sequence[str]) -> Numbers:
    """Return the likeliest MIDI number of each note, (n,), of logits (n, C).

    Raises:
        ValueError: there is not one class for each logit, or a class is no MIDI number.
    """
    if logits.ndim != 2 or logits.shape[1] != len(classes):
        raise ConfigError(f"detected: want logits (n, {len(classes)}), got {tuple(logits.shape)}")
    return _midi(classes)[logits.argmax(1).cpu().numpy()]


def scorable(requested: npt.ArrayLike, classes: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return which of the requested pitches (n,) are known and among the classes.

    Raises:
        ValueError: a class is no MIDI number.
    """
    return np.isin(requested, _midi(classes))


def pitch_accuracy(requested: npt.ArrayLike, logits: Tensor, classes: Sequence[str]) -> PitchAccuracy:
    """Compare requested pitches (n,), MIDI or -1 for unknown, with the likeliest of logits (n, C).

    Raises:
        ConfigError: as `detected`, or there is not one pitch for each note.
        DataError: no note can be judged.
    """
    expected, predicted = np.asarray(requested, np.int64), detected(logits, classes)
    if expected.shape != predicted.shape:
        raise ConfigError(f"pitch_accuracy: want a pitch a note, {len(predicted)}; got shape {expected.shape}")
    known, scored = expected >= 0, scorable(expected, classes)
    if not scored.any():
        raise DataError(
            f"pitch_accuracy: want notes with a known pitch, got none among {len(expected)}; "
            "use NSynth names or the notes.json of mars-generate"
        )
    away = np.abs(predicted - expected)[scored]
    return PitchAccuracy(
        accuracy=float((away == 0).mean()),
        chroma=float((away % 12 == 0).mean()),
        octave_errors=float(((away > 0) & (away % 12 == 0)).mean()),
        semitone_errors=float((away == 1).mean()),
        notes=int(scored.sum()),
        unknown=int((~known).sum()),
        outside=int((known & ~scored).sum()),
    )


def _midi(classes: Sequence[str]) -> Numbers:
    if not all(name.isdecimal() and int(name) < 128 for name in classes):
        raise ConfigError(
            f"want classes that are MIDI numbers, got {', '.join(classes[:3])}...; use a pitch classifier"
        )
    return np.array([int(name) for name in classes], np.int64)


def _pitch_accuracy(name: str, role: Role, row: Row) -> dict[str, Figure]:
    requested, classes, logits = row.fake.notes.pitch, row.fake.classes(role), row.fake.logits(role)
    result = pitch_accuracy(requested, logits, classes)
    right = (detected(logits, classes) == requested)[scorable(requested, classes)]
    estimate = bootstrap_mean(torch.from_numpy(right).double(), seed=row.conditions.seed)
    return {name: figure(estimate, {}, asdict(result))}


MEASURES = (
    Measure(
        metrics=(Metric("pitch_accuracy", "pitch accuracy", +1, 150),),
        compute={"standard": partial(_pitch_accuracy, "pitch_accuracy", "pitch")},
        role="pitch",
    ),
    Measure(
        metrics=(Metric("pitch_accuracy_crepe", "pitch accuracy (CREPE)", +1, 210),),
        compute={"standard": partial(_pitch_accuracy, "pitch_accuracy_crepe", "crepe")},
        role="crepe",
    ),
)
