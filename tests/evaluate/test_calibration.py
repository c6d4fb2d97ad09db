"""The published row that needs no model, against ours; only where NSynth's test set and the weights are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mars.evaluate import embedders
from mars.evaluate.notes import open_notes
from mars.evaluate.score import ANCHOR, Settings, evaluate

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
@pytest.mark.parametrize("as_published", [False, True], ids=["labels correct", "labels as published"])
def test_the_anchor_is_that_of_the_published_table(as_published):
    real = open_notes(NSYNTH_TEST)
    settings = Settings(profile="vinay2022", mode="reconstruction", as_published=as_published)
    cache = Path(WEIGHTS) / "features"
    report = evaluate(real, real, embedders.load("sony", framing="google-16-bit"), settings, cache=cache).report
    found = {name: metric.value for name, metric in report.baselines[ANCHOR].items()}
    assert found == pytest.approx(PUBLISHED, rel=0.15)
