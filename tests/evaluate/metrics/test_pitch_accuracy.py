"""Requested against detected pitch."""

from __future__ import annotations

import pytest
import torch

from mars.errors import DataError
from mars.evaluate.metrics.pitch_accuracy import PitchAccuracy, detected, pitch_accuracy

CLASSES = tuple(str(midi) for midi in range(40, 80))


def logits(*pitches: int) -> torch.Tensor:
    """Logits whose maximum is at these pitches."""
    return torch.stack([torch.eye(len(CLASSES))[pitch - 40] for pitch in pitches])


def test_the_likeliest_class_is_the_pitch():
    assert detected(logits(41, 79), CLASSES).tolist() == [41, 79]


def test_every_kind_of_error_is_counted():
    actual = logits(60, 61, 72, 48, 55, 70, 70)
    expected = [60, 60, 60, 60, 60, -1, 100]
    assert pitch_accuracy(expected, actual, CLASSES) == PitchAccuracy(
        accuracy=0.2, chroma=0.6, octave_errors=0.4, semitone_errors=0.2, notes=5, unknown=1, outside=1
    )


def test_what_cannot_be_judged_is_an_error():
    with pytest.raises(DataError, match="want notes with a known pitch, got none among 2"):
        pitch_accuracy([-1, 120], logits(60, 60), CLASSES)
    with pytest.raises(ValueError, match="want a pitch a note, 2"):
        pitch_accuracy([60], logits(60, 60), CLASSES)
    with pytest.raises(ValueError, match=r"want logits \(n, 40\)"):
        detected(torch.zeros(2, 39), CLASSES)
    with pytest.raises(ValueError, match="classes that are MIDI numbers, got bass"):
        detected(torch.zeros(1, 2), ("bass", "brass"))
