"""Notes to pack: tones, and NSynth in miniature."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mars.labels import FAMILIES, SOURCES, labels_of

RATE, SAMPLES = 16_000, 64_000


def list_again(out: Path, name: str) -> None:
    """Let the manifest say of a file that was changed what is true of it now."""
    manifest = json.loads((out / "manifest.json").read_text())
    content = (out / name).read_bytes()
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (out / "manifest.json").write_text(json.dumps(manifest))


def tone(pitch: int = 60, samples: int = SAMPLES, rate: int = RATE) -> np.ndarray:
    """A sine at half of full scale, (samples,) float32."""
    hertz = 440 * 2 ** ((pitch - 69) / 12)
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)).astype(np.float32)


class Nsynth:
    """A folder in NSynth's layout; edit `listing` and call `save`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listing: dict[str, Any] = {}
        (path / "audio").mkdir(parents=True)

    def add(self, name: str, audio: np.ndarray | None = None) -> None:
        labels = labels_of(name)
        assert labels is not None
        sound = tone(labels.pitch) if audio is None else audio
        soundfile.write(self.path / "audio" / f"{name}.wav", sound, RATE, subtype="PCM_16")
        self.listing[name] = {
            "note_str": name,
            "instrument_str": labels.instrument,
            "instrument_family": labels.family,
            "instrument_family_str": FAMILIES[labels.family],
            "instrument_source": labels.source,
            "instrument_source_str": SOURCES[labels.source],
            "pitch": labels.pitch,
            "velocity": labels.velocity,
            "sample_rate": RATE,
            "qualities": [0] * 10,
        }

    def save(self) -> Path:
        (self.path / "examples.json").write_text(json.dumps(self.listing))
        return self.path


@pytest.fixture
def nsynth(tmp_path: Path) -> Nsynth:
    """Six notes of three instruments."""
    made = Nsynth(tmp_path / "notes")
    for instrument in ("bass_electronic_018", "flute_acoustic_002", "vocal_synthetic_003"):
        for pitch in (60, 72):
            made.add(f"{instrument}-{pitch:03d}-100")
    made.save()
    return made
