"""Kernel Inception Distance (Binkowski et al. 2018, arXiv:1801.01401), and the statistic published under its name.

Features decide what it measures: of the pitch network, PKID; of the instrument network, IKID.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from mars.errors import DataError, needed
from mars.evaluate.metrics.bootstrap import RESAMPLES, SEED, Estimate, estimate, resample_counts
from mars.evaluate.metrics.mmd import mmd2, polynomial, squared_distances
from mars.evaluate.metrics.samples import canonical, checked

BLOCK = 5000  # notes that the published scripts compare at a time


@dataclass(frozen=True, slots=True)
class KID:
    """Both forms of the estimate; `std` is the spread of the subsets, several times the standard error of either."""

    mean: float  # over the subsets, as usually published
    std: float
    full: Estimate  # of all notes at once
    subsets: int
    subset_size: int


@dataclass(frozen=True, slots=True)
class KIDVinay2022:
    """Mean and population standard deviation over blocks of BLOCK notes: 0 with one block."""

    mean: float
    std: float
    blocks: int


def kid(
    real: Tensor,
    fake: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> KID:
    """Unbiased MMD^2 with the kernel (<x, y> / d + 1)^3 between features real (n, d) and fake (m, d).

    The order of the notes does not matter. A value below 0 is as legitimate as one above it.

    Raises:
        ValueError: real and fake have other shapes than these.
        DataError: fewer than subset_size (or 10) notes on a side, or features that are not finite.
        MissingPackage: torchmetrics is not installed.
    """
    least = max(subset_size, 10)
    real, fake = _pair("kid", real, fake, "features", least)
    with needed("KID", "torchmetrics"):
        from torchmetrics.image.kid import KernelInceptionDistance
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save", UserWarning)
        metric = KernelInceptionDistance(torch.nn.Identity(), subsets=subsets, subset_size=subset_size)
    real, fake = canonical(real), canonical(fake)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics draws its subsets from the global generator
        torch.default_generator.manual_seed(seed)
        mean, std = metric.compute()
    counts = resample_counts(len(real), resamples, seed, 0), resample_counts(len(fake), resamples, seed, 1)
    full = estimate(mmd2(real[:, None], fake[:, None], polynomial, *counts))
    return KID(float(mean), float(std), full, subsets, subset_size)


def kid_vinay2022(real: Tensor, fake: Tensor) -> KIDVinay2022:
    """The published statistic of logits real (n, C) and fake (n, C), in the order of the files.

    Kernel 16 / (16 + |x - y|^2); (sum K_xx + sum K_yy) / (n (n - 1)) - 2 sum K_xy / n^2 with the diagonals, all
    ones, left in the sums, which adds about 2 / (n - 1); mean over blocks of BLOCK notes, the last one shorter.
    Described from the scripts of Nistal et al. 2020 (pkid.py, ikid.py), which Vinay and Lerch 2022 ran.

    Raises:
        ValueError: real and fake have other shapes than these.
        DataError: not as many fake notes as real ones, fewer than 2 in a block, or logits that are not finite.
    """
    real, fake = _pair("kid_vinay2022", real, fake, "classes", 2)
    if len(real) != len(fake):
        raise DataError(f"kid_vinay2022: want as many fake notes as real ones, got {len(fake)} and {len(real)}")
    if len(real) % BLOCK == 1:
        raise DataError(f"kid_vinay2022: want blocks of {BLOCK}, the last of 2 notes or more; got {len(real)} notes")
    blocks = zip(real.double().split(BLOCK), fake.double().split(BLOCK), strict=True)
    values = torch.stack([_biased_mmd2(x, y) for x, y in blocks])
    return KIDVinay2022(float(values.mean()), float(values.std(correction=0)), len(values))


def _biased_mmd2(x: Tensor, y: Tensor) -> Tensor:
    n = len(x)
    xx, yy, xy = ((16 / (16 + squared_distances(a, b))).sum() for a, b in ((x, x), (y, y), (x, y)))
    return (xx + yy) / (n * (n - 1)) - 2 * xy / n**2


def _pair(name: str, real: Tensor, fake: Tensor, width: str, minimum: int) -> tuple[Tensor, Tensor]:
    real = checked(f"{name} (real)", real, "notes", width, minimum=minimum)
    fake = checked(f"{name} (fake)", fake, "notes", width, minimum=minimum)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"{name}: want as many {width} for both, got {real.shape[1]} (real) and {fake.shape[1]} (fake)"
        )
    return real, fake
