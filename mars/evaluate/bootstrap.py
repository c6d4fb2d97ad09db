"""Bootstrap intervals over clips (Efron 1979), from how often each clip is drawn.

A resample is a row of counts w with sum(w) = n, not a list of clips with copies in it: every statistic here is a
function of the counts. That matters for U-statistics such as MMD (Gretton et al. 2012, JMLR 13, eq. 3), which leave
out the pair of a sample with itself: in a list with copies the pairs of one clip's copies would be counted as pairs of
different clips, each k(x, x), and every replicate would lie above the truth. With counts the pairs are those of
different clips, weighted w_i w_j, so the replicates' mean is the estimate.

The interval is the percentile interval of the replicates, moved so that their mean is the estimate. For a mean or a
U-statistic that moves it by nothing but the noise of the draws. Statistics with a bias of order 1/n (Fréchet distance,
Inception Score) have it twice in every replicate, whose clips are fewer; moving takes one of the two back, and the
interval is that of the estimate with the estimate's own bias.

What it cannot know: clips count as independent. Several notes of one instrument are not, and a reconstruction is not
independent of its original; the first makes the intervals too narrow, the second too wide. Where real and fake have
one distribution the MMD is degenerate and its interval too wide as well: that it holds 0 is no proof of equality.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mars.errors import ConfigError
from mars.evaluate.samples import checked
from mars.runtime import stream

SEED = 2020  # of everything random here
RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, its bootstrap interval at LEVEL and its standard error."""

    value: float
    low: float
    high: float
    error: float


def resample_counts(clips: int, resamples: int, seed: int, key: int = 0) -> Tensor:
    """Return how often each clip is drawn, float64 (1 + resamples, clips); each row sums to `clips`.

    The first row is all ones: what a statistic gives there is the estimate itself.
    key: tells two sets of clips of one bootstrap apart, which are drawn independently.
    """
    if clips < 1 or resamples < 2:
        raise ConfigError(f"bootstrap: want clips >= 1 and resamples >= 2, got {clips} and {resamples}")
    counts = torch.zeros(1 + resamples, clips, dtype=torch.float64)
    counts[0] = 1
    indices = torch.randint(clips, (resamples, clips), generator=stream(seed, key))
    counts[1:].scatter_add_(1, indices, torch.ones(resamples, clips, dtype=torch.float64))
    return counts


def estimate(values: Tensor) -> Estimate:
    """Estimate from a statistic of every row of `resample_counts`, (1 + resamples,)."""
    value, replicates = values[0].double(), values[1:].double()
    centred = replicates - replicates.mean() + value
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(centred, tails).tolist()
    return Estimate(float(value), low, high, float(replicates.std()))


def bootstrap_mean(values: Tensor, *, resamples: int = RESAMPLES, seed: int = SEED) -> Estimate:
    """Return the mean over clips of values (clips,), whatever their order.

    Raises:
        ValueError: not one number a clip.
        DataError: no clips, or values that are not finite.
    """
    values = checked("bootstrap_mean", values, "clips").double().sort().values
    return estimate(resample_counts(len(values), resamples, seed) @ values / len(values))


def bootstrap_median(values: Tensor, *, resamples: int = RESAMPLES, seed: int = SEED) -> Estimate:
    """Return the median over clips of values (clips,), the lower one of an even number, whatever their order.

    Raises:
        ValueError: not one number a clip.
        DataError: no clips, or values that are not finite.
    """
    values = checked("bootstrap_median", values, "clips").double().sort().values
    seen = resample_counts(len(values), resamples, seed).cumsum(1)
    return estimate(values[(seen < len(values) / 2).sum(1)])
