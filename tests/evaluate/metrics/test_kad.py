"""KAD against its definition."""

from __future__ import annotations

import pytest
import scipy.spatial
import torch

from mars.errors import DataError
from mars.evaluate.metrics.kad import kad, median_distance


def test_definition():
    real, fake = torch.randn(30, 1, 4), torch.randn(20, 1, 4) + 0.4
    found = kad(real, fake, resamples=50)
    x, y = real[:, 0].double(), fake[:, 0].double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (-(a[:, None] - b).square().sum(2) / (2 * found.bandwidth**2)).exp()

    within = (kernel(x, x).sum() - 30) / (30 * 29) + (kernel(y, y).sum() - 20) / (20 * 19)
    assert found.estimate.value == pytest.approx(100 * float(within - 2 * kernel(x, y).mean()), rel=1e-9)
    assert found.estimate.low < found.estimate.value < found.estimate.high


def test_bandwidth_is_the_reference_sets_median_distance():
    real, fake = torch.randn(300, 1, 4), torch.randn(300, 1, 4)
    exact = float(torch.from_numpy(scipy.spatial.distance.pdist(real[:, 0].numpy())).median())
    assert median_distance(real.double()) == pytest.approx(exact, rel=0.03)
    assert kad(real, fake, resamples=2).bandwidth == kad(real, 9 * fake, resamples=2).bandwidth


def test_unbiased_and_frames_of_a_clip_are_no_evidence():
    null = []
    for _ in range(100):
        real, fake = (torch.randn(20, 1, 4) + 0.1 * torch.randn(20, 5, 4) for _ in range(2))
        null.append(kad(real, fake, resamples=2).estimate.value)
    values = torch.tensor(null)
    assert abs(float(values.mean())) < 3 * float(values.std()) / 10
    assert float(values.min()) < 0
    copies = kad(real[:, :1].repeat(1, 3, 1), fake[:, :1].repeat(1, 3, 1), resamples=2).estimate
    assert copies.value == pytest.approx(kad(real[:, :1], fake[:, :1], resamples=2).estimate.value, abs=1e-9)


def test_depends_on_contents_and_seed_alone():
    real, fake = torch.randn(30, 3, 4), torch.randn(30, 3, 4)
    found = kad(real, fake, resamples=50)
    assert kad(real[torch.randperm(30)], fake.flip(0), resamples=50) == found
    assert kad(real, fake, resamples=50, seed=1).estimate.high != found.estimate.high


def test_errors():
    with pytest.raises(DataError, match=r"^kad \(fake\): want at least 10 clips, got 9"):
        kad(torch.randn(10, 1, 3), torch.randn(9, 1, 3))
    with pytest.raises(DataError, match="want reference frames that differ"):
        kad(torch.zeros(10, 1, 3), torch.randn(10, 1, 3))
    with pytest.raises(ValueError, match="want as many features for both, got 3"):
        kad(torch.randn(10, 1, 3), torch.randn(10, 1, 4))
