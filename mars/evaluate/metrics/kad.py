"""Kernel Audio Distance (Chung et al. 2025, arXiv:2502.15602): 100 times an unbiased MMD^2 with a Gaussian kernel.

The bandwidth is the median distance between frames of the reference set, so that it does not change with the set that
is evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mars.errors import DataError
from mars.evaluate.bootstrap import RESAMPLES, SEED, Estimate, estimate, resample_counts
from mars.evaluate.embedders.roles import Role
from mars.evaluate.metrics.measure import Measure, Metric, Row, figure
from mars.evaluate.mmd import gaussian, mmd2
from mars.evaluate.report import Figure
from mars.evaluate.samples import canonical, checked_pair
from mars.runtime import stream

SCALE = 100
PAIRS = 10_000  # of which the median is taken


@dataclass(frozen=True, slots=True)
class KAD:
    """SCALE * MMD^2, and the kernel's bandwidth in units of the features."""

    estimate: Estimate
    bandwidth: float


def kad(real: Tensor, fake: Tensor, *, resamples: int = RESAMPLES, seed: int = SEED) -> KAD:
    """Compute the KAD of clips real (n, t, d) and fake (m, u, d), whatever their order; the interval is over clips.

    Pairs of frames of one clip do not count: they are closer than frames of different clips, and would make every
    set look unlike every other, itself included. Values below 0 are legitimate.

    Raises:
        ValueError: other shapes.
        DataError: fewer than 10 clips on a side, frames that are not finite, or at least half of the reference's
            frames alike.
    """
    real, fake = map(canonical, checked_pair("kad", real, fake, "clips", "frames", "features", minimum=10))
    bandwidth = median_distance(real, seed=seed)
    counts = resample_counts(len(real), resamples, seed, 0), resample_counts(len(fake), resamples, seed, 1)
    return KAD(estimate(SCALE * mmd2(real, fake, gaussian(bandwidth), *counts)), bandwidth)


def median_distance(clips: Tensor, *, seed: int = SEED) -> float:
    """Return the median distance between frames of different clips (n, t, d), over PAIRS random pairs.

    Raises:
        DataError: it is 0.
    """
    n, t, _ = clips.shape
    generator = stream(seed)
    first = torch.randint(n, (PAIRS,), generator=generator)
    second = (first + torch.randint(1, n, (PAIRS,), generator=generator)) % n
    one, other = (clips[i, torch.randint(t, (PAIRS,), generator=generator)] for i in (first, second))
    median = float((one - other).norm(dim=1).median())
    if median == 0:
        raise DataError("kad: want reference frames that differ, got at least half of them alike; check the real notes")
    return median


def _kad(name: str, role: Role, row: Row) -> dict[str, Figure]:
    result = kad(row.real.frames(role), row.fake.frames(role), seed=row.conditions.seed)
    return {name: figure(result.estimate, {"kernel": "Gaussian", "times": SCALE}, {"bandwidth": result.bandwidth})}


MEASURES = (
    Measure(
        metrics=(Metric("kad", "KAD", -1, 100),),
        compute={"standard": partial(_kad, "kad", "vggish")},
        role="vggish",
    ),
    Measure(
        metrics=(Metric("kad_classifier", "KAD (classifier)", -1, 180),),
        compute={"standard": partial(_kad, "kad_classifier", "instrument")},
        role="instrument",
    ),
)
