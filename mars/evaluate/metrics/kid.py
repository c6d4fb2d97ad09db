"""Kernel Inception Distance (Binkowski et al. 2018, arXiv:1801.01401), and the statistic published under its name.

Features decide what it measures: of the pitch network, PKID; of the instrument network, IKID.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mars.errors import ConfigError, DataError, needed
from mars.evaluate.bootstrap import RESAMPLES, SEED, Estimate, estimate, resample_counts
from mars.evaluate.embedders.classifier import Classifier, logits_vinay2022
from mars.evaluate.embedders.roles import Role
from mars.evaluate.extractor import NoteFeatures
from mars.evaluate.metrics.measure import ALL_NOTES, Measure, Metric, Row, figure
from mars.evaluate.mmd import mmd2, polynomial, squared_distances
from mars.evaluate.report import Figure
from mars.evaluate.samples import canonical, checked

BLOCK = 5000  # notes that the published scripts compare at a time
_SUBSET = 1000  # notes at most


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
    """Compute the unbiased MMD^2 with the kernel (<x, y> / d + 1)^3 between features real (n, d) and fake (m, d).

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
    """Compute the published statistic of logits real (n, C) and fake (n, C), in the order of the files.

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
        raise ConfigError(
            f"{name}: want as many {width} for both, got {real.shape[1]} (real) and {fake.shape[1]} (fake)"
        )
    return real, fake


def _kid(name: str, role: Role, row: Row) -> dict[str, Figure]:
    real, fake = (side.frames(role)[:, 0] for side in (row.real, row.fake))
    # A subset of all notes would always be the same one.
    size = _SUBSET if min(len(real), len(fake)) > _SUBSET else min(len(real), len(fake)) // 2
    result = kid(real, fake, subset_size=size, seed=row.conditions.seed)
    details = {
        "subsets_mean": result.mean, "subsets_std": result.std,
        "subsets": result.subsets, "subset_size": result.subset_size,
    }  # fmt: skip
    return {name: figure(result.full, {"kernel": "(<x, y> / d + 1)^3", "of": ALL_NOTES}, details)}


def _kid_vinay2022(name: str, role: Role, row: Row) -> dict[str, Figure]:
    if len(row.real) != len(row.fake):  # before minutes of listening
        raise DataError(f"want as many notes to evaluate as real ones, got {len(row.fake)} and {len(row.real)}")
    seed = row.conditions.seed
    result = kid_vinay2022(*(_training_logits(side, role, seed, i) for i, side in enumerate((row.real, row.fake))))
    params = {
        "kernel": "16 / (16 + |x - y|^2), with diagonal", "network": "in training mode",
        "label_order": row.conditions.label_order,
    }  # fmt: skip
    return {name: Figure(value=result.mean, params=params, details={"std": result.std, "blocks": result.blocks})}


def _training_logits(notes: NoteFeatures, role: Role, seed: int, key: int) -> Tensor:
    """Return logits of the role's classifier in training mode, as the published scripts leave it."""
    network = notes.network(role)
    assert isinstance(network, Classifier)
    progress = notes.progress(f"{network.id} in training mode")
    return notes.once(
        ("in training mode", role, key),
        lambda: logits_vinay2022(network, notes.notes, seed=seed, key=key, progress=progress),
    )


MEASURES = (
    Measure(
        metrics=(Metric("pkid", "PKID", -1, 20),),
        compute={"standard": partial(_kid, "pkid", "pitch"), "vinay2022": partial(_kid_vinay2022, "pkid", "pitch")},
        role="pitch",
    ),
    Measure(
        metrics=(Metric("ikid", "IKID", -1, 30),),
        compute={
            "standard": partial(_kid, "ikid", "instrument"),
            "vinay2022": partial(_kid_vinay2022, "ikid", "instrument"),
        },
        role="instrument",
    ),
    Measure(
        metrics=(Metric("pkid_crepe", "PKID (CREPE)", -1, 200),),
        compute={"standard": partial(_kid, "pkid_crepe", "crepe")},
        role="crepe",
    ),
)
