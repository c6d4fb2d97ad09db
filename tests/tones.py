"""A few seconds' worth of tones, and settings, for classifiers to learn from."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from rich.console import Console

from mars.data import Dataset
from mars.evaluate.embedders.classifier import PRESETS
from mars.train import classifier as trainer

SAMPLES = 8192
QUICK = dataclasses.replace(
    PRESETS["tiny"],
    front_end=dataclasses.replace(PRESETS["tiny"].front_end, samples=31 * 256),
    pitches=(50, 61),
    epochs=12,
    patience=12,
    batch_size=8,
    masks=1,
)


def tones() -> Dataset:
    """An octave of six instruments, three with even partials (bass) and three with odd ones (brass), two a split."""
    rng = np.random.default_rng(0)
    time = np.arange(SAMPLES) / 16_000
    audio, rows = [], []
    for instrument in range(6):
        for pitch in [*range(50, 62)] * 2:
            hertz, partials = 440 * 2 ** ((pitch - 69) / 12), ((1, 2, 4), (1, 3, 5))[instrument % 2]
            weights = rng.uniform(0.5, 1, 3)
            tone = sum(w * np.sin(2 * np.pi * k * hertz * time) for w, k in zip(weights, partials, strict=True))
            audio.append(5_000 * np.asarray(tone) + rng.normal(0, 20, SAMPLES))
            rows.append([instrument, instrument % 2, instrument % 2, pitch, 100, instrument // 2])
    return Dataset(
        np.stack(audio).astype("<i2"),
        np.array(rows, np.int32),
        [f"n{i}" for i in range(len(rows))],
        [f"i{i}" for i in range(6)],
        16_000,
        "f" * 64,
        {"kind": "test"},
    )


def relabelled(dataset: Dataset, column: int, values: object) -> Dataset:
    """The dataset with another column of labels."""
    metadata = dataset.metadata.copy()
    metadata[:, column] = values
    return dataclasses.replace(dataset, metadata=metadata)


def train(dataset, out, task="pitch", **options):
    """A classifier's directory, made with the preset tiny."""
    return trainer.train(dataset, task, "tiny", out, console=Console(quiet=True), **options)


def document(path):
    """What a classifier says of itself."""
    return json.loads((path / "classifier.json").read_text())
