"""Precision, recall (Kynkäänniemi et al. 2019, arXiv:1904.06991), density and coverage (Naeem et al. 2020,
arXiv:2002.09797) of one vector per note.

A note's ball reaches to its k-th neighbour of its own set, the ball's edge not included. Precision: fake notes in any
real ball; recall: real notes in any fake ball; density: real balls per fake note, over k, which can pass 1; coverage:
real notes with a fake note in their ball.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mars.evaluate.bootstrap import RESAMPLES, SEED, Estimate, bootstrap_mean
from mars.evaluate.metrics.measure import Measure, Metric, Row, figure
from mars.evaluate.mmd import squared_distances
from mars.evaluate.report import Figure
from mars.evaluate.samples import checked_pair


@dataclass(frozen=True, slots=True)
class PRDC:
    """The four values; their intervals are over the notes that are counted, the balls staying as they are."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate
    k: int


def prdc(real: Tensor, fake: Tensor, *, k: int = 5, resamples: int = RESAMPLES, seed: int = SEED) -> PRDC:
    """Compute the PRDC of features real (n, d) and fake (m, d), whatever their order.

    Copies of a note would shrink its ball, so the bootstrap draws the notes that are counted, and not the balls.

    Raises:
        ValueError: other shapes.
        DataError: k notes or fewer on a side, or features that are not finite.
    """
    real, fake = (x.double() for x in checked_pair("prdc", real, fake, "notes", "features", minimum=k + 1))
    between = squared_distances(real, fake)  # (n, m)
    in_real = between < _squared_radii(real, k)[:, None]
    in_fake = between < _squared_radii(fake, k)
    counted = {
        "precision": in_real.any(0),
        "recall": in_fake.any(1),
        "density": in_real.double().sum(0) / k,
        "coverage": in_real.any(1),
    }
    means = {name: bootstrap_mean(x.double(), resamples=resamples, seed=seed) for name, x in counted.items()}
    return PRDC(**means, k=k)


def _squared_radii(samples: Tensor, k: int) -> Tensor:
    """Return the squared distance (n,) of each of samples (n, d) to its k-th neighbour, itself not being one.

    Less a part in a billion, so that rounding does not move a copy of the k-th neighbour into the ball.
    """
    return squared_distances(samples, samples).fill_diagonal_(torch.inf).kthvalue(k, dim=1).values * (1 - 1e-9)


def _prdc(row: Row) -> dict[str, Figure]:
    real, fake = (side.frames("instrument")[:, 0] for side in (row.real, row.fake))
    result = prdc(real, fake, seed=row.conditions.seed)
    values = {
        "precision": result.precision, "recall": result.recall, "density": result.density, "coverage": result.coverage,
    }  # fmt: skip
    return {name: figure(value, {"neighbours": result.k}) for name, value in values.items()}


MEASURES = (
    Measure(
        metrics=(
            Metric("precision", "precision", +1, 110),
            Metric("recall", "recall", +1, 120),
            Metric("density", "density", +1, 130),
            Metric("coverage", "coverage", +1, 140),
        ),
        compute={"standard": _prdc},
        role="instrument",
    ),
)
