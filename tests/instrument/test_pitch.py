"""Measured pitch: against tones whose pitch is known."""

from __future__ import annotations

import numpy as np
import pytest

from mars.instrument.pitch import measured


def tone(pitch, rate=16_000, seconds=3.0, partials=8, decay=0.0):
    t = np.arange(round(seconds * rate)) / rate
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    kept = [h for h in range(1, partials + 1) if h * frequency < rate / 2]
    return 0.2 * np.exp(-decay * t) * sum(np.sin(2 * np.pi * h * frequency * t + h) / h for h in kept)


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("pitch", [24.2, 40.0, 60.37, 71.9, 96.0])
def test_tones_are_measured_to_a_cent(pitch, rate):
    assert measured(tone(pitch, rate), rate) == pytest.approx(pitch, abs=0.01)


def test_a_note_that_dies_away_and_ends_is_measured_where_it_sounds():
    samples = np.concatenate([tone(57.5, seconds=1.5, decay=4), np.zeros(40_000)])
    assert measured(samples, 16_000) == pytest.approx(57.5, abs=0.02)


def test_the_fundamental_may_be_missing():
    t = np.arange(32_000) / 16_000
    samples = sum(np.sin(2 * np.pi * h * 110 * t) for h in (2, 3, 4, 5))
    assert measured(samples, 16_000) == pytest.approx(45, abs=0.02)


def test_noise_silence_and_little_have_no_pitch():
    rng = np.random.default_rng(0)
    assert measured(rng.normal(size=32_000), 16_000) is None
    assert measured(np.zeros(32_000), 16_000) is None
    assert measured(tone(60)[:500], 16_000) is None
