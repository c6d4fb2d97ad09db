"""Mel MSE and MAE: errors between the log-mels of `mars.evaluate.mel`, one of 1 being 100 dB.

Reconstructions are compared with their originals, new notes with the nearest real note.
"""

from __future__ import annotations

from typing import Any

from mars.evaluate.bootstrap import bootstrap_mean
from mars.evaluate.metrics.measure import Measure, Metric, Row, figure
from mars.evaluate.report import Figure


def _mel_errors(row: Row) -> dict[str, Figure]:
    result = row.errors
    details: dict[str, Any] = {}
    if row.conditions.mode == "generation":
        details = {
            "nearest_real_notes": result.distinct,  # of how many different ones
            "most_frequent": int(result.index.bincount().max()),
        }
    params = {"against": "nearest real note" if details else "the original", "unit": "100 dB"}
    values = {"mse": result.errors.mse, "mae": result.errors.mae}
    return {
        name: figure(bootstrap_mean(errors, seed=row.conditions.seed), params, details)
        for name, errors in values.items()
    }


MEASURES = (
    Measure(
        metrics=(Metric("mse", "mel MSE", -1, 60), Metric("mae", "mel MAE", -1, 70)),
        compute={"standard": _mel_errors, "vinay2022": _mel_errors},
    ),
)
