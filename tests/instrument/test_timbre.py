"""The timbre distance: small for one sound at two pitches, large for two sounds at one pitch."""

from __future__ import annotations

import numpy as np
import pytest

from mars.instrument.timbre import distance, timbre


def note(pitch, levels, decay, rate=16_000):
    """Partials of these levels in dB, dying away by `decay` dB a second."""
    t = np.arange(3 * rate) / rate
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    partials = [10 ** (level / 20) * np.sin(2 * np.pi * h * frequency * t) for h, level in enumerate(levels, 1)]
    return 10 ** (-decay * t / 20) * sum(partials)


def test_pitch_and_loudness_matter_less_than_what_sounds():
    hollow, bright = [0, -40, -10, -40, -20, -40], [0, -3, -6, -9, -12, -15]
    of = {
        (pitch, name): timbre(scale * note(pitch, levels, decay), 16_000, pitch)
        for pitch, scale in ((60, 0.1), (65, 0.4))
        for name, levels, decay in (("hollow", hollow, 0), ("bright", bright, 0), ("plucked", bright, 30))
    }
    same = max(distance(of[60, name], of[65, name]) for name in ("hollow", "bright", "plucked"))
    other = min(distance(of[60, a], of[65, b]) for a, b in (("hollow", "bright"), ("bright", "plucked")))
    assert same < 3
    assert other > 2 * same
    assert distance(of[60, "hollow"], of[60, "hollow"]) == 0


def test_levels_are_those_of_the_partials():
    found = timbre(note(60, [0, -20, -6], 0), 16_000, 60)
    sustained = found[2]
    assert sustained[2] - sustained[1] == pytest.approx(-20, abs=0.5)
    assert sustained[3] - sustained[1] == pytest.approx(-6, abs=0.5)
    assert sustained[0] < -50


def test_a_short_note_is_described_too():
    assert np.isfinite(timbre(note(60, [0], 0)[:2000], 16_000, 60)).all()
