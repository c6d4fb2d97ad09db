from __future__ import annotations

import numpy as np
import pytest

from mars.data.pitch import estimate
from mars.labels import UNKNOWN

RATE = 16_000


def note(
    pitch: float, rate: int = RATE, vibrato: float = 0.0, partials: tuple[float, ...] = (1, 0.5, 0.3)
) -> np.ndarray:
    """A second of a note, (rate,), with a vibrato of so many semitones."""
    time = np.arange(rate) / rate
    hertz = 440 * 2 ** ((pitch - 69 + vibrato * np.sin(2 * np.pi * 5 * time)) / 12)
    phase = 2 * np.pi * np.cumsum(hertz) / rate
    heard = [a * np.sin(k * phase) for k, a in enumerate(partials, 1) if k * hertz.max() < rate / 2]
    return (0.3 * np.sum(heard, axis=0)).astype(np.float32)


@pytest.mark.parametrize(
    ("pitch", "rate"), [(24, 8000), (84, 8000), (24, RATE), (61, RATE), (100, RATE), (40, 44_100), (100, 44_100)]
)
def test_pitches_at_any_rate(pitch, rate):
    found, sure = estimate(note(pitch, rate), rate)
    assert found == pitch
    assert sure > 0.8


def test_vibrato_and_a_missing_fundamental():
    assert estimate(note(57, vibrato=0.4), RATE)[0] == 57
    assert estimate(note(45, partials=(0, 1, 1, 1, 1)), RATE)[0] == 45


@pytest.mark.parametrize("sound", ["noise", "silence", "click", "short noise"])
def test_what_has_no_pitch_gets_none(sound):
    rng = np.random.default_rng(0)
    made = {
        "noise": rng.normal(0, 0.2, RATE),
        "silence": np.zeros(RATE),
        "click": np.eye(1, RATE, 2000)[0],
        "short noise": rng.normal(0, 0.2, 200),
    }
    assert estimate(made[sound].astype(np.float32), RATE) == (UNKNOWN, 0.0)


def test_the_sure_part_counts_by_its_loudness():
    rng = np.random.default_rng(0)
    attack = rng.normal(0, 0.3, RATE // 10).astype(np.float32)
    assert estimate(np.concatenate([attack, note(64)]), RATE)[0] == 64
    assert estimate(np.concatenate([0.02 * note(64), rng.normal(0, 0.3, RATE)]).astype(np.float32), RATE)[0] == UNKNOWN
