"""Pictures and sounds of a few held-out notes, made at intervals while a model trains.

A tokenizer shows how it reconstructs them. A VAR shows the notes it generates when asked for their labels, as far
as these are conditions of it; seed and index stay, so that the same note can be followed.
Where no notes are held out they are training notes, and their names say so.

    samples/originals/       the held-out notes themselves; not for a VAR without conditions
    samples/step-00000500/   0.wav, 0.png, 1.wav, … and samples.json, which names them
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mars import audio
from mars.data import Dataset
from mars.data.splits import spread
from mars.errors import CheckpointError
from mars.files import write_atomically
from mars.labels import arguments, described
from mars.model import Model, tokens_of
from mars.pages.picture import Picture, spectrogram_picture, write_png
from mars.runs.stage import Stage

COUNT = 4  # notes
FOLDER = "samples"
ORIGINALS = "originals"
SIZE = 256, 256  # pixels of a picture, height and width, at most


@dataclass(frozen=True, eq=False)
class Sample:
    """A note with its waveform and spectrogram."""

    name: str
    waveform: Tensor  # (samples,), full scale 1
    spectrogram: Tensor  # (bins, frames) in [-1, 1]

    @property
    def picture(self) -> Picture:
        """Its spectrogram, with octaves of the same height."""
        height, width = SIZE
        return spectrogram_picture(self.spectrogram, frequency="log", height=height, width=width)


class Sampler:
    """What a stage makes of the same few held-out notes, or training notes without any, called at intervals."""

    def __init__(self, stage: Stage, dataset: Dataset, seed: int) -> None:
        self.stage, self.dataset, self.seed = stage, dataset, seed
        notes = spread(dataset.split("valid"), COUNT)
        self.kind = "" if len(notes) else " (a training note)"  # so that nobody takes it for a held-out one
        self.notes = notes if len(notes) else spread(dataset.split("train"), COUNT)

    def originals(self, model: Model) -> list[Sample]:
        """Return the notes themselves; none for a VAR without conditions, whose notes have nothing to do with them."""
        if model.var is not None and not model.var.config.condition:
            return []
        config = model.config.audio
        waveforms = self.dataset.waveforms(self.notes)[:, : config.samples]
        spectrograms = audio.spectrogram(waveforms, config)
        names = [self.dataset.names[note] + self.kind for note in self.notes]
        return [Sample(*parts) for parts in zip(names, waveforms, spectrograms, strict=True)]

    def samples(self, model: Model) -> list[Sample]:
        """Return reconstructions of the notes by the stage's model, or notes generated for their conditions.

        Raises:
            CheckpointError: the model gives numbers that are not finite.
        """
        return self._reconstructed(model) if model.var is None else self._generated(model)

    def _reconstructed(self, model: Model) -> list[Sample]:
        waveforms = self.dataset.waveforms(self.notes).to(model.device)
        ids = tokens_of(model.tokenizer, waveforms, model.config.audio)
        spectrograms, waveforms = model.spectrogram(ids), model.decode(ids).cpu()
        if not bool(waveforms.isfinite().all()):
            raise CheckpointError("the tokenizer's output is not finite")
        names = [self.dataset.names[note] + self.kind for note in self.notes]
        return [
            Sample(*parts) for parts in zip(names, audio.within_full_scale(waveforms), spectrograms.cpu(), strict=True)
        ]

    def _generated(self, model: Model) -> list[Sample]:
        samples = []
        for index, note in enumerate(self.notes):
            condition = self._condition(model, int(note))
            (generated,) = model.iterate(1, seed=self.seed, start=index, allow_untrained=True, **condition)
            name = described(generated.condition) or f"note {index}"
            samples.append(Sample(name, generated.waveform, generated.log_magnitude))
        return samples

    def _condition(self, model: Model, note: int) -> dict[str, Any]:
        """Return the known labels of the note that the model has as conditions."""
        ranges = model.ranges
        known = self.dataset.known(note)
        return arguments({name: value for name, value in known.items() if ranges.takes(name, value)})


def write(path: Path, samples: Sequence[Sample], sample_rate: int) -> None:
    """Write the samples as the new directory `path`, all or nothing, in place of one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(".tmp-*"):  # of a process that was killed
        shutil.rmtree(left_over)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.mkdir()
    try:
        for index, sample in enumerate(samples):
            audio.write_wav(temporary / f"{index}.wav", sample.waveform, sample_rate)
            write_png(temporary / f"{index}.png", sample.picture)
        document = {
            "names": [sample.name for sample in samples],
            "sample_rate": sample_rate,
            "samples": len(samples[0].waveform),
        }
        write_atomically(temporary / "samples.json", (json.dumps(document, indent=1) + "\n").encode())
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def folder(run: Path, step: int) -> Path:
    """Return the folder of the samples of a step."""
    return run / FOLDER / f"step-{step:08d}"
