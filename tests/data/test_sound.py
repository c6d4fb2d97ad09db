"""Sounds that callers give, as waveforms of a model."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch

from mars.config import AudioConfig
from mars.data.sound import waveform
from mars.errors import ConfigError, DataError

CONFIG = AudioConfig(n_fft=128, hop=64, bins=64, frames=64, samples=4000)
TONE = 0.5 * np.sin(np.arange(4000) * 0.1).astype(np.float32)


def test_files_and_samples_are_the_same_sound(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, TONE, 16_000, subtype="FLOAT")
    for given in (path, str(path), TONE, torch.from_numpy(TONE), TONE.astype(np.float64), TONE[None], TONE[:, None]):
        found, changes = waveform("sound", given, CONFIG)
        assert torch.equal(found, torch.from_numpy(TONE))
        assert changes == frozenset()


def test_what_was_done_to_a_sound_is_said():
    assert waveform("sound", np.tile(TONE, 2), CONFIG)[1] == {"cut"}
    found, changes = waveform("sound", TONE[:3000], CONFIG)
    assert changes == {"padded"}
    assert not found[3000:].any()
    stereo = np.stack([TONE, TONE])
    for given in (stereo, stereo.T):
        found, changes = waveform("sound", given, CONFIG)
        assert changes == {"mixed"}
        assert torch.equal(found, torch.from_numpy(TONE))


def test_a_rate_beside_the_samples_is_converted():
    pytest.importorskip("soxr")
    found, changes = waveform("sound", (np.sin(np.arange(12_000) / 30), 48_000), CONFIG)
    assert changes == {"resampled"}
    assert found.shape == (4000,)
    assert float((found - torch.sin(torch.arange(4000) / 10))[100:-100].abs().max()) < 0.01


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("missing.wav", DataError, "missing.wav is not a file"),
        (np.zeros(4000, np.float32), DataError, "sound: silent"),
        (TONE * np.float32("nan"), DataError, "sound: holds NaN"),
        (TONE[:100], DataError, "sound: too short"),
        ((TONE * 32767).astype(np.int16), ConfigError, "sound: want a path, a waveform"),
        (np.zeros((2, 3, 4), np.float32), ConfigError, r"got torch.float32 \(2, 3, 4\)"),
        ([0.1] * 4000, ConfigError, "got list"),
        ((TONE, "16k"), ConfigError, "the rate of sound in Hz must be a whole number"),
    ],
)
def test_what_is_no_sound_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        waveform("sound", given, CONFIG)


def test_a_file_that_is_no_sound_is_named(tmp_path):
    path = tmp_path / "a.wav"
    path.write_text("no sound")
    with pytest.raises(DataError, match=r"a\.wav: unreadable"):
        waveform("sound", path, CONFIG)
