"""PRDC against its definition and on planted sets."""

from __future__ import annotations

import pytest
import torch

from mars.errors import DataError
from mars.evaluate.metrics.prdc import PRDC, prdc


def values(found: PRDC) -> tuple[float, ...]:
    return found.precision.value, found.recall.value, found.density.value, found.coverage.value


def test_definition():
    real, fake = torch.randn(25, 3).double(), torch.randn(18, 3).double() * 0.8 + 0.2
    k = 3

    def radius(x: torch.Tensor, i: int) -> float:
        return sorted(float((x[i] - y).norm()) for j, y in enumerate(x) if j != i)[k - 1]

    real_radius = [radius(real, i) for i in range(25)]
    fake_radius = [radius(fake, i) for i in range(18)]
    distance = [[float((x - y).norm()) for y in fake] for x in real]
    precision = sum(any(distance[i][j] < real_radius[i] for i in range(25)) for j in range(18)) / 18
    recall = sum(any(distance[i][j] < fake_radius[j] for j in range(18)) for i in range(25)) / 25
    density = sum(distance[i][j] < real_radius[i] for i in range(25) for j in range(18)) / (k * 18)
    coverage = sum(min(distance[i]) < real_radius[i] for i in range(25)) / 25
    assert values(prdc(real, fake, k=k)) == pytest.approx((precision, recall, density, coverage), abs=1e-12)


def test_a_set_and_its_copy():
    real = torch.randn(400, 64) + 1000  # far from the origin, where products of float32 would lose the distances
    assert values(prdc(real, real.flip(0))) == pytest.approx((1, 1, 1, 1), abs=1e-12)


def test_planted_sets():
    real = torch.cat([torch.randn(200, 4), torch.randn(200, 4) + 50])
    assert values(prdc(real, torch.randn(300, 4) - 500)) == (0, 0, 0, 0)
    one_mode = prdc(real, torch.randn(300, 4))
    assert one_mode.precision.value > 0.9
    assert one_mode.recall.value == pytest.approx(0.5, abs=0.05)
    assert one_mode.coverage.value == pytest.approx(0.5, abs=0.05)
    assert one_mode.recall.low < 0.5 < one_mode.recall.high
    middle = prdc(real, torch.randn(300, 4) * 0.1)
    assert middle.density.value > 1.5  # where the real notes are densest, though they cover little
    assert middle.coverage.value < 0.3


def test_order_does_not_matter():
    real, fake = torch.randn(80, 5), torch.randn(70, 5)
    assert prdc(real.flip(0), fake[torch.randperm(70)]) == prdc(real, fake)


def test_errors():
    with pytest.raises(DataError, match=r"^prdc \(real\): want at least 6 notes, got 5; evaluate more of them$"):
        prdc(torch.randn(5, 3), torch.randn(9, 3))
    with pytest.raises(ValueError, match=r"^prdc: want as many features for both, got 3 \(real\), 2 \(fake\)$"):
        prdc(torch.randn(9, 3), torch.randn(9, 2))
