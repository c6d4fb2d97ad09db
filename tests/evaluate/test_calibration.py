"""The published row that needs no model, against ours; only where NSynth's test set and the weights are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mars.evaluate.baselines import anchor
from mars.evaluate.embedders import roles as embedders
from mars.evaluate.scoring import Settings, evaluate
from mars.evaluate.sets import open_notes

NSYNTH_TEST, WEIGHTS = os.environ.get("MARS_NSYNTH_TEST"), os.environ.get("MARS_WEIGHTS_DIR")

# Vinay and Lerch (ISMIR 2022), Table 1: 4096 notes low-passed at 1 kHz and reduced to 8 bit.
PUBLISHED = {
    "ndb_k": 0.72, "pkid": 0.0123, "ikid": 0.0006, "pis": 2.9356, "iis": 5.3017,
    "mse": 0.0257, "mae": 0.0857, "fad": 1.4952,
}  # fmt: skip


@pytest.mark.skipif(
    not (NSYNTH_TEST and WEIGHTS),
    reason="needs NSynth's test set (MARS_NSYNTH_TEST) and the published weights (MARS_WEIGHTS_DIR)",
)
def test_the_anchor_is_that_of_the_published_table():
    """In one of the ways to read the paper: the classifiers swapped or not, VGGish as meant or as it hears 16 bit."""
    real = open_notes(NSYNTH_TEST)
    found = {}
    for as_published in (False, True):
        for framing in ("google-16-bit", "google"):
            settings = Settings(
                profile="vinay2022", mode="reconstruction", metrics=tuple(PUBLISHED), as_published=as_published
            )
            networks = embedders.load("sony", framing=framing)
            cache = Path(WEIGHTS) / "features"
            report = evaluate(real, anchor(real), networks, settings, cache=cache, baselines=False).report
            found[as_published, framing] = {name: metric.value for name, metric in report.metrics.items()}
    ratios = {reading: {name: row[name] / PUBLISHED[name] for name in PUBLISHED} for reading, row in found.items()}
    assert any(row == pytest.approx(PUBLISHED, rel=0.15) for row in found.values()), ratios
