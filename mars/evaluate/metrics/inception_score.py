"""Inception Score (Salimans et al. 2016, arXiv:1606.03498, §4), and the running mean published under its name.

IS = exp(E_x KL(p(y|x) || p(y))), from 1 to the number of classes; it needs no real notes. Of the pitch network's
logits it is PIS, of the instrument network's IIS.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mars.evaluate.bootstrap import RESAMPLES, SEED, Estimate, estimate, resample_counts
from mars.evaluate.embedders.roles import Role
from mars.evaluate.metrics.measure import ALL_NOTES, Measure, Metric, Row, figure
from mars.evaluate.report import Figure
from mars.evaluate.samples import canonical, checked
from mars.runtime import stream

BATCH = 50  # notes after which the published script reads its running score
BLOCK = 5000  # notes after which it starts afresh


@dataclass(frozen=True, slots=True)
class InceptionScore:
    """Mean and sample standard deviation over the splits, and the score of all notes at once."""

    mean: float
    std: float
    full: Estimate
    splits: int
    classes: int


@dataclass(frozen=True, slots=True)
class InceptionScoreVinay2022:
    """Mean and population standard deviation of the running scores, and how many notes they were made from."""

    mean: float
    std: float
    notes: int
    classes: int


def inception_score(
    logits: Tensor, *, splits: int = 10, resamples: int = RESAMPLES, seed: int = SEED
) -> InceptionScore:
    """Score of logits (notes, classes), shuffled before they are split; their order does not matter.

    Splits differ by one note at most.

    Raises:
        ValueError: other shapes.
        DataError: fewer than two notes a split, or logits that are not finite.
    """
    logits = canonical(checked("inception_score", logits, "notes", "classes", minimum=2 * splits))
    shuffled = logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))]
    scores = torch.cat([_scores(part, torch.ones(1, len(part))) for part in shuffled.tensor_split(splits)])
    full = estimate(_scores(logits, resample_counts(len(logits), resamples, seed)))
    std = float(scores.std()) if splits > 1 else 0.0
    return InceptionScore(float(scores.mean()), std, full, splits, logits.shape[1])


def inception_score_vinay2022(logits: Tensor) -> InceptionScoreVinay2022:
    """Return the published number of logits (notes, classes), in the order of the files, on which it depends.

    The score of all notes so far is read after every BATCH of them, with 1e-6 added to p(y) in the logarithm, and
    the mean of these readings reported. Every BLOCK notes it starts afresh; with more than BLOCK, a last block that
    is not full is left out. Described from the scripts of Nistal et al. 2020 (pis.py, iis.py), which Vinay and Lerch
    2022 ran.

    Raises:
        ValueError: other shapes.
        DataError: no notes, or logits that are not finite.
    """
    logits = checked("inception_score_vinay2022", logits, "notes", "classes").double()
    block = min(len(logits), BLOCK)
    used = len(logits) // block * block
    readings = []
    for part in logits[:used].split(block):
        log_p = part.log_softmax(1)
        seen = torch.arange(BATCH, len(part) + BATCH, BATCH).clamp(max=len(part))
        p_sum = log_p.exp().cumsum(0)[seen - 1]
        negative_entropy = (log_p.exp() * log_p).sum(1).cumsum(0)[seen - 1]
        cross = (p_sum * (p_sum / seen[:, None] + 1e-6).log()).sum(1)
        readings.append(((negative_entropy - cross) / seen).exp())
    scores = torch.cat(readings)
    return InceptionScoreVinay2022(float(scores.mean()), float(scores.std(correction=0)), used, logits.shape[1])


def _scores(logits: Tensor, counts: Tensor) -> Tensor:
    """Score (resamples,) of logits (n, C) taken counts (resamples, n) times."""
    log_p = logits.log_softmax(1)
    p, counts = log_p.exp(), counts.double()
    total = counts.sum(1, keepdim=True)
    marginal = counts @ p / total
    negative_entropy = counts @ (p * log_p).sum(1) / total[:, 0]
    return (negative_entropy - torch.special.xlogy(marginal, marginal).sum(1)).exp()


def _inception_score(name: str, role: Role, row: Row) -> dict[str, Figure]:
    result = inception_score(row.fake.logits(role), seed=row.conditions.seed)
    of_real = inception_score(row.real.logits(role), seed=row.conditions.seed)
    details = {
        "splits_mean": result.mean, "splits_std": result.std, "splits": result.splits, "real": of_real.full.value,
    }  # fmt: skip
    return {name: figure(result.full, {"classes": result.classes, "of": ALL_NOTES}, details)}


def _inception_score_vinay2022(name: str, role: Role, row: Row) -> dict[str, Figure]:
    logits = row.fake.logits(role)
    result = inception_score_vinay2022(logits)
    shuffled = logits[torch.randperm(len(logits), generator=stream(row.conditions.seed))]
    details = {
        "std": result.std, "notes": result.notes,
        "shuffled": inception_score_vinay2022(shuffled).mean,
        "real": inception_score_vinay2022(row.real.logits(role)).mean,
    }  # fmt: skip
    params = {"order": "of the files", "classes": result.classes, "label_order": row.conditions.label_order}
    return {name: Figure(value=result.mean, params=params, details=details)}


MEASURES = (
    Measure(
        metrics=(Metric("pis", "PIS", +1, 40),),
        compute={
            "standard": partial(_inception_score, "pis", "pitch"),
            "vinay2022": partial(_inception_score_vinay2022, "pis", "pitch"),
        },
        role="pitch",
    ),
    Measure(
        metrics=(Metric("iis", "IIS", +1, 50),),
        compute={
            "standard": partial(_inception_score, "iis", "instrument"),
            "vinay2022": partial(_inception_score_vinay2022, "iis", "instrument"),
        },
        role="instrument",
    ),
    Measure(
        metrics=(Metric("pis_crepe", "PIS (CREPE)", +1, 190),),
        compute={"standard": partial(_inception_score, "pis_crepe", "crepe")},
        role="crepe",
    ),
)
