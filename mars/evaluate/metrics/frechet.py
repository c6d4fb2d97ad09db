"""Fréchet distance of two Gaussians (Dowson and Landau 1982), Fréchet Audio Distance (Kilgour et al. 2019,
arXiv:1812.08466) and its extrapolation to infinitely many notes (Gui et al. 2024, arXiv:2311.01616).

    d^2 = |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))

Of estimated moments it is too large by about a constant over the number of notes. A note's frames resemble each other,
so the notes count, not the frames. Everything is in float64 on the CPU; a distance of nothing can come out a little
below 0 (at most about 1e-7 of the traces) and is not clamped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mars.errors import DataError
from mars.evaluate.bootstrap import SEED, Estimate, estimate, resample_counts
from mars.evaluate.metrics.measure import Measure, Metric, Row, figure
from mars.evaluate.report import Figure
from mars.evaluate.samples import canonical, checked, checked_pair
from mars.runtime import stream


@dataclass(frozen=True, slots=True)
class Moments:
    """Number, mean (d,) and sum of squared deviations (d, d) of some frames; `+` pools those of two sets."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, frames: Tensor) -> Moments:
        """Compute the moments of frames (n, d).

        Raises:
            ValueError: another shape.
            DataError: no frames, or some that are not finite.
        """
        frames = checked("Moments.of", frames, "frames", "features").double()
        mean = frames.mean(0)
        centred = frames - mean
        return cls(len(frames), mean, centred.T @ centred)

    def __add__(self, other: Moments) -> Moments:  # Chan, Golub and LeVeque 1983
        count = self.count + other.count
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(step, step) * (self.count * other.count / count)
        return Moments(count, self.mean + step * (other.count / count), scatter)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (d, d).

        Raises:
            DataError: there is one frame only.
        """
        if self.count < 2:
            raise DataError(f"covariance: want at least 2 frames, got {self.count}; evaluate more notes")
        return self.scatter / (self.count - 1)

    def distance(self, other: Moments) -> float:
        """Return `frechet_distance` to the Gaussian of other frames."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


@dataclass(frozen=True, slots=True)
class FAD:
    """The distance and how many frames it was made from."""

    estimate: Estimate
    frames_real: int
    frames_fake: int


@dataclass(frozen=True, slots=True)
class FADInfinity:
    """The intercept and slope of distance over 1 / notes, and the points they were fitted to."""

    value: float
    slope: float
    notes: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Compute d^2 of two Gaussians with means (d,) and covariances (d, d), symmetric and of any rank.

    tr((S_a S_b)^(1/2)) is the sum of the square roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is
    symmetric: no complex numbers, no matrix square root that fails on a covariance without full rank.
    """
    mean_a, covariance_a, mean_b, covariance_b = (x.double() for x in (mean_a, covariance_a, mean_b, covariance_b))
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return float(distance)


def fad(real: Tensor, fake: Tensor, *, resamples: int = 200, seed: int = SEED) -> FAD:
    """Compute the Fréchet distance of the pooled frames of clips real (n, t, d) and fake (m, u, d).

    The interval is over clips, whose order does not matter.

    Raises:
        ValueError: other shapes.
        DataError: fewer than 2 clips on a side, or frames that are not finite.
    """
    real, fake = _clips("fad", real, fake, minimum=2)
    drawn_real = _resampled(real, resample_counts(len(real), resamples, seed, 0))
    drawn_fake = _resampled(fake, resample_counts(len(fake), resamples, seed, 1))
    distances = [a.distance(b) for a, b in zip(drawn_real, drawn_fake, strict=True)]
    return FAD(estimate(torch.tensor(distances, dtype=torch.float64)), real[..., 0].numel(), fake[..., 0].numel())


def fad_infinity(real: Tensor, fake: Tensor, *, points: int = 15, draws: int = 4, seed: int = SEED) -> FADInfinity:
    """Extrapolate the FAD of clips fake (m, t, d) to infinitely many, against all of real (n, u, d).

    Distances of subsets of the fake clips, `points` sizes evenly spaced in 1 / size from a fifth of them to all,
    each the mean of `draws` subsets, are fitted by a line over 1 / size. Subsets are of clips and drawn without
    replacement: those drawn with replacement are samples of a distribution that is these very clips, and their line
    would lead back to the FAD itself. A subset has at least as many clips, and twice as many frames, as there are
    features: with fewer the covariance is nearly singular and the bias no line. What the finite number of real clips
    adds is left in.

    Raises:
        ValueError: other shapes.
        DataError: fewer than twice the clips of the smallest subset.
    """
    real, fake = _clips("fad_infinity", real, fake, minimum=2)
    clips, frames, features = fake.shape
    smallest = max(clips // 5, features, math.ceil(2 * features / frames))
    if 2 * smallest > clips:
        raise DataError(f"fad_infinity: want at least {2 * smallest} fake clips, got {clips}; generate more of them")
    target = Moments.of(real.flatten(0, 1))
    sizes = (1 / torch.linspace(1 / smallest, 1 / clips, points, dtype=torch.float64)).round().long().tolist()
    distances = []
    for size in sizes:
        total = 0.0
        for draw in range(draws):
            chosen = torch.randperm(clips, generator=stream(seed, size, draw))[:size]
            total += target.distance(Moments.of(fake[chosen].flatten(0, 1)))
        distances.append(total / draws)
    slope, intercept = statistics.linear_regression([1 / size for size in sizes], distances)
    return FADInfinity(intercept, slope, tuple(sizes), tuple(distances))


def _resampled(clips: Tensor, counts: Tensor) -> Iterator[Moments]:
    """Yield the moments of the frames of clips (n, t, d) for every row of counts (resamples, n)."""
    middle = clips.mean((0, 1))  # near every mean, so that the squares keep their digits
    centred = (clips - middle).flatten(0, 1)
    for row in counts:
        weights = row.repeat_interleave(clips.shape[1])
        n = int(weights.sum())
        step = weights @ centred / n
        scatter = (centred * weights[:, None]).T @ centred - torch.outer(step, step) * n
        yield Moments(n, middle + step, scatter)


def _clips(name: str, real: Tensor, fake: Tensor, minimum: int) -> tuple[Tensor, Tensor]:
    real, fake = checked_pair(name, real, fake, "clips", "frames", "features", minimum=minimum)
    return canonical(real), canonical(fake)


def _fad(row: Row) -> dict[str, Figure]:
    result = fad(row.real.frames("vggish"), row.fake.frames("vggish"), seed=row.conditions.seed)
    details = {"frames_real": result.frames_real, "frames_fake": result.frames_fake}
    return {"fad": figure(result.estimate, {}, details)}


def _fad_infinity(row: Row) -> dict[str, Figure]:
    result = fad_infinity(row.real.frames("vggish"), row.fake.frames("vggish"), seed=row.conditions.seed)
    details = {"slope": result.slope, "notes": list(result.notes), "distances": list(result.distances)}
    return {"fad_infinity": Figure(value=result.value, details=details)}


def _fad_classifier(row: Row) -> dict[str, Figure]:
    real, fake = (Moments.of(canonical(side.frames("instrument")[:, 0])) for side in (row.real, row.fake))
    return {"fad_classifier": Figure(value=real.distance(fake), params={"features": len(real.mean)})}


MEASURES = (
    Measure(metrics=(Metric("fad", "FAD", -1, 80),), compute={"standard": _fad, "vinay2022": _fad}, role="vggish"),
    Measure(metrics=(Metric("fad_infinity", "FAD∞", -1, 90),), compute={"standard": _fad_infinity}, role="vggish"),
    Measure(
        metrics=(Metric("fad_classifier", "FAD (classifier)", -1, 170),),
        compute={"standard": _fad_classifier},
        role="instrument",
    ),
)
