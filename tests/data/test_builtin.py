from __future__ import annotations

import json
from importlib import resources

import numpy as np

from mars.data import open_dataset
from mars.labels import FAMILIES, labels_of


def test_the_built_in_notes_are_a_dataset():
    dataset = open_dataset(None)
    assert 200 <= len(dataset) <= 400
    assert dataset.samples == 64_000
    assert dataset.sample_rate == 16_000
    assert set(dataset.column("family")) == set(range(len(FAMILIES)))
    peaks = dataset.waveforms(np.arange(len(dataset))).abs().amax(1)
    assert abs(peaks - 0.9).max() < 1e-3
    assert dataset.origin["licence"] == "MIT"
    for name, row in zip(dataset.names, dataset.metadata, strict=True):
        labels = labels_of(name)
        assert labels is not None
        assert dataset.instruments[row[0]] == labels.instrument
        assert row[1:5].tolist() == [labels.family, labels.source, labels.pitch, labels.velocity]


def test_its_splits_share_no_instrument():
    dataset = open_dataset(None)
    found = [set(dataset.column("instrument")[dataset.split(name)]) for name in ("train", "valid", "test")]
    assert all(found)
    assert sum(map(len, found)) == len(dataset.instruments)
    assert 0.08 < len(dataset.split("valid")) / len(dataset) < 0.16
    assert set(dataset.column("family")[dataset.split("train")]) == set(range(len(FAMILIES)))


def test_it_is_small_and_licensed():
    folder = resources.files("mars").joinpath("assets", "notes")
    files = list(folder.joinpath("audio").iterdir())
    assert len(files) == len(json.loads(folder.joinpath("examples.json").read_bytes())["notes"])
    assert sum(len(file.read_bytes()) for file in files) < 8e6
    assert "Permission is hereby granted" in folder.joinpath("LICENSE").read_text("utf-8")
