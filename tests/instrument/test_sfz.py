"""The arithmetic of an SFZ file: every key and velocity in its reach has one sample, and what is written is meant."""

from __future__ import annotations

import re

import pytest

from mars.instrument.sfz import Region, layers, spread, text


@pytest.mark.parametrize(("pitches", "reach"), [([60], 0), ([48, 51, 54], 1), ([40, 47, 60, 61], 3), ([2, 126], 5)])
def test_every_key_has_one_sample(pitches, reach):
    zones = spread(pitches, reach)
    keys = [key for low, high in zones.values() for key in range(low, high + 1)]
    assert keys == list(range(max(pitches[0] - reach, 0), min(pitches[-1] + reach, 127) + 1))
    for pitch, (low, high) in zones.items():
        assert low <= pitch <= high
        assert all(abs(key - pitch) <= min(abs(key - other) for other in pitches) for key in range(low, high + 1))


@pytest.mark.parametrize("velocities", [[100], [50, 127], [25, 75, 127], [0]])
def test_every_velocity_has_one_layer(velocities):
    zones = layers(velocities).values()
    assert [v for low, high in zones for v in range(low, high + 1)] == list(range(1, 128))


def test_what_is_written_is_what_is_meant():
    looped = Region("samples/060.wav", (59, 61), (1, 127), 60, -7, -1.25, (100, 2000))
    plain = Region("samples/063.wav", (62, 64), (1, 127), 63, 0, 0.0, None)
    written = text(["name"], [looped, plain])
    assert written.startswith("// name\n")
    first, second = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in written.splitlines() if "<region>" in line]
    assert first == {
        "sample": "samples/060.wav", "lokey": "59", "hikey": "61", "lovel": "1", "hivel": "127",
        "pitch_keycenter": "60", "tune": "-7", "volume": "-1.2", "loop_mode": "loop_continuous",
        "loop_start": "100", "loop_end": "2000",
    }  # fmt: skip
    assert second["loop_mode"] == "no_loop"
    assert "loop_start" not in second
