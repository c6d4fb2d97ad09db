"""Samples for a sampler: where they begin and end, how they are faded, and loops without a seam."""

from __future__ import annotations

import numpy as np
import pytest

from mars.instrument.sample import PEAK, cut

RATE = 16_000


def held(seconds=3.0, before=0.3, after=0.5, frequency=220.0, decay=0.0, partials=(1, 2, 3)):
    t = np.arange(round(seconds * RATE)) / RATE
    sound = sum(np.sin(2 * np.pi * frequency * h * t + h) / h for h in partials) * np.exp(-decay * t)
    return np.concatenate([np.zeros(round(before * RATE)), 0.2 * sound, np.zeros(round(after * RATE))])


def played(sample, count):
    """What a sampler plays of a held key."""
    x, (first, last) = sample.samples, sample.loop
    turns = [x[: last + 1]] + [x[first : last + 1]] * (count // (last + 1 - first) + 1)
    return np.concatenate(turns)[:count]


def test_silence_around_a_note_is_cut_off():
    found = cut(held(decay=1.5), RATE)
    assert found.loop is None
    assert 2.5 * RATE < len(found.samples) <= 3.03 * RATE
    assert np.abs(found.samples).max() <= PEAK + 1e-6
    assert np.abs(found.samples[:2]).max() < 0.01
    assert np.abs(found.samples[-2:]).max() < 0.001


def test_what_dies_away_is_not_looped():
    assert cut(held(decay=1.5), RATE).loop is None
    assert cut(held(seconds=0.3), RATE).loop is None


@pytest.mark.parametrize("frequency", [61.7, 220.0, 987.77])
def test_a_sustained_note_is_looped_without_a_seam(frequency):
    found = cut(held(frequency=frequency), RATE)
    assert found.loop is not None
    first, last = found.loop
    assert 0.4 * RATE <= first < last < len(found.samples)
    assert last + 1 - first >= 0.4 * RATE
    sound = played(found, 10 * RATE)
    jump = np.abs(np.diff(sound))
    assert jump[len(found.samples) // 2 :].max() <= 1.1 * jump[: len(found.samples) // 2].max()
    level = np.sqrt(np.square(sound[: len(sound) // 800 * 800].reshape(-1, 800)).mean(1))[4:]
    assert 20 * np.log10(level.max() / level.min()) < 1


def test_partials_that_drift_keep_their_level_over_the_loop():
    """As Griffin-Lim leaves them: no two places are alike in all partials."""
    t = np.arange(3 * RATE) / RATE
    sound = sum(np.sin(2 * np.pi * f * t) for f in (220, 441.3, 663.1, 886.7)) * 0.2
    found = cut(sound, RATE)
    assert found.loop is not None
    turned = played(found, 10 * RATE)
    level = np.sqrt(np.square(turned.reshape(-1, 4000)).mean(1))[2:]
    assert 20 * np.log10(level.max() / level.min()) < 3


def test_silence_is_refused():
    with pytest.raises(ValueError, match="silent"):
        cut(np.zeros(1000), RATE)
