"""Intervals against what they estimate, and against copies of clips."""

from __future__ import annotations

import pytest
import torch

from mars.errors import DataError
from mars.evaluate.bootstrap import bootstrap_mean, bootstrap_median, estimate, resample_counts
from mars.evaluate.mmd import mmd2, polynomial


def test_counts():
    counts = resample_counts(50, 200, seed=1)
    assert counts.shape == (201, 50)
    assert torch.equal(counts[0], torch.ones(50, dtype=torch.float64))
    assert torch.equal(counts.sum(1), torch.full((201,), 50.0, dtype=torch.float64))
    assert torch.equal(counts, resample_counts(50, 200, seed=1))
    assert not torch.equal(counts, resample_counts(50, 200, seed=2))
    assert not torch.equal(counts, resample_counts(50, 200, seed=1, key=1))
    # Multinomial: variance n (1 / n) (1 - 1 / n)
    assert float(counts[1:].var()) == pytest.approx(1 - 1 / 50, rel=0.05)
    with pytest.raises(ValueError, match="want clips >= 1 and resamples >= 2, got 0 and 5"):
        resample_counts(0, 5, seed=1)


def test_mean_has_its_standard_error_and_no_order():
    values = torch.randn(400)
    found = bootstrap_mean(values)
    assert found.value == pytest.approx(float(values.double().mean()), abs=1e-12)
    assert found.error == pytest.approx(float(values.std()) / 20, rel=0.1)
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.error, rel=0.1)
    assert bootstrap_mean(values.flip(0)) == found
    with pytest.raises(DataError, match="want at least 1 clips, got 0"):
        bootstrap_mean(torch.zeros(0))


def test_interval_of_a_mean_covers():
    draws = torch.randn(300, 80) ** 2  # skewed, mean 1
    covered = [found.low < 1 < found.high for found in (bootstrap_mean(x, resamples=300) for x in draws)]
    assert 0.88 <= sum(covered) / len(covered) <= 0.98


def test_interval_is_centred_on_the_estimate():
    replicates = torch.randn(2000) + 5  # a bias of 5 in every replicate
    found = estimate(torch.cat([torch.tensor([1.0]), replicates]))
    assert found.value == 1
    assert found.low == pytest.approx(1 - 1.96, abs=0.15)
    assert found.high == pytest.approx(1 + 1.96, abs=0.15)


def draw(n: int, shift: float) -> torch.Tensor:
    return torch.randn(n, 1, 6, dtype=torch.float64) + shift


def test_replicates_of_mmd_are_not_moved_by_copies_of_clips():
    x, y = draw(60, 0), draw(60, 0.3)
    counts = resample_counts(60, 1000, 1, 0), resample_counts(60, 1000, 1, 1)
    values = mmd2(x, y, polynomial, *counts)
    standard_error = float(values[1:].std()) / 1000**0.5
    assert abs(float(values[1:].mean() - values[0])) < 4 * standard_error
    # The same resamples as lists of clips, where copies of a clip count as pairs of clips.
    ones = torch.ones(1, 60, dtype=torch.float64)
    listed = [
        mmd2(
            x.repeat_interleave(w.long(), dim=0), y.repeat_interleave(v.long(), dim=0), polynomial, ones, ones
        )
        for w, v in zip(counts[0][1:200], counts[1][1:200], strict=True)
    ]  # fmt: skip
    assert float(torch.cat(listed).mean() - values[0]) > 20 * standard_error


def test_interval_of_mmd_covers():
    ones = torch.ones(1, 2000, dtype=torch.float64)
    truth = float(mmd2(draw(2000, 0), draw(2000, 0.3), polynomial, ones, ones))
    found = []
    for seed in range(80):
        counts = resample_counts(60, 200, seed, 0), resample_counts(60, 200, seed, 1)
        found.append(estimate(mmd2(draw(60, 0), draw(60, 0.3), polynomial, *counts)))
    assert 0.85 <= sum(x.low < truth < x.high for x in found) / len(found) <= 1
    spread = float(torch.tensor([x.value for x in found]).std())
    assert float(torch.tensor([x.error for x in found]).mean()) == pytest.approx(spread, rel=0.35)


def test_medians_are_those_of_the_resamples():
    values = torch.randn(41, generator=torch.Generator().manual_seed(3)).double()
    found = bootstrap_median(values, resamples=300)
    counts = resample_counts(41, 300, 2020).long()
    ordered = values.sort().values
    medians = torch.stack([ordered.repeat_interleave(row).median() for row in counts])
    assert found == estimate(medians)
    assert found.value == float(values.median())
    assert found == bootstrap_median(values.flip(0), resamples=300)
    assert bootstrap_median(torch.tensor([1.0, 2.0, 3.0, 4.0])).value == 2
