"""A note: what it says of itself, its file, and how a notebook shows it."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import soundfile
import torch

from mars.notes import Note

RATE = 16_000
CONDITION = {"family": "organ", "source": "electronic", "pitch": 60, "velocity": None}


@pytest.fixture
def note() -> Note:
    waveform = 0.5 * torch.sin(torch.arange(RATE // 2) / 9)
    return Note(7, waveform, torch.linspace(-1, 1, 64 * 32).reshape(64, 32), torch.arange(21), CONDITION, RATE)


def test_it_says_what_it_is(note):
    assert repr(note) == "<Note 7: electronic organ, pitch 60, 0.5 s at 16000 Hz>"
    assert note.label == "electronic organ, pitch 60"
    assert note.spectrogram() is note.log_magnitude
    nothing = Note(0, note.waveform, note.log_magnitude, note.ids, dict.fromkeys(CONDITION), RATE)
    assert nothing.label == "any"


def test_it_is_saved_as_wav(note, tmp_path):
    note.save(str(tmp_path / "x.wav"))
    samples, rate = soundfile.read(tmp_path / "x.wav", dtype="int16")
    assert rate == RATE
    np.testing.assert_array_equal(samples, (note.waveform * 32768).round().numpy().astype(np.int16))


def test_a_notebook_shows_and_plays_it(note):
    page = note._repr_html_()
    picture = base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', page)[1])
    assert picture.startswith(b"\x89PNG")
    sound = base64.b64decode(re.search(r'<audio controls[^>]*src="data:audio/flac;base64,([^"]+)"', page)[1])
    samples, rate = soundfile.read(io.BytesIO(sound), dtype="int16")
    assert (len(samples), rate) == (len(note.waveform), RATE)
    assert "electronic organ, pitch 60" in page


def test_what_a_strangers_model_calls_a_note_runs_nothing_in_a_notebook(note):
    hostile = {**CONDITION, "instrument": '"><script>alert(1)</script>'}
    page = Note(0, note.waveform, note.log_magnitude, note.ids, hostile, RATE)._repr_html_()
    assert "<script" not in page
