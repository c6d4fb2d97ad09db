"""KID against torchmetrics and its definition; the published statistic against its closed forms."""

from __future__ import annotations

import sys

import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from mars.errors import ConfigError, DataError
from mars.evaluate.metrics import kid as kid_module
from mars.evaluate.metrics.kid import kid, kid_vinay2022
from mars.evaluate.mmd import gaussian, mmd2, polynomial, squared_distances


def ones(n: int) -> torch.Tensor:
    return torch.ones(1, n, dtype=torch.float64)


def full(real: torch.Tensor, fake: torch.Tensor) -> float:
    return float(mmd2(real.double()[:, None], fake.double()[:, None], polynomial, ones(len(real)), ones(len(fake))))


def test_both_forms_are_torchmetrics_on_all_notes():
    real, fake = torch.randn(60, 16), torch.randn(60, 16) + 0.2
    expected = float(poly_mmd(real.double(), fake.double()))
    actual = kid(real, fake, subsets=3, subset_size=60)
    assert actual.mean == pytest.approx(expected, abs=1e-12)
    assert actual.std == pytest.approx(0, abs=1e-12)
    assert actual.full.value == pytest.approx(expected, abs=1e-12)
    assert actual.full.low < expected < actual.full.high


def test_u_statistic_of_sets_of_different_sizes():
    real, fake = torch.randn(7, 3).double(), torch.randn(5, 3).double()

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    def within(x: torch.Tensor) -> float:
        return sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (len(x) * (len(x) - 1))

    between = sum(k(a, b) for a in real for b in fake) / 35
    assert full(real, fake) == pytest.approx(within(real) + within(fake) - 2 * between, rel=1e-12)


def test_blocks_do_not_show(monkeypatch):
    x, y = torch.randn(40, 3, 5).double(), torch.randn(30, 2, 5).double()
    w, v = torch.randint(0, 3, (4, 40)).double(), torch.randint(0, 3, (4, 30)).double()
    whole = mmd2(x, y, gaussian(2.0), w, v)
    monkeypatch.setattr("mars.evaluate.mmd._BLOCK", 7)
    torch.testing.assert_close(mmd2(x, y, gaussian(2.0), w, v), whole, rtol=1e-12, atol=1e-14)


def test_unbiased_and_not_clamped():
    null = torch.tensor([full(torch.randn(30, 8), torch.randn(40, 8)) for _ in range(200)])
    assert abs(float(null.mean())) < 3 * float(null.std()) / 200**0.5
    assert float(null.min()) < 0


def test_kid_depends_on_contents_and_seed_alone():
    real, fake = torch.randn(120, 8), torch.randn(100, 8)
    state = torch.get_rng_state()
    found = kid(real, fake, subsets=5, subset_size=50, resamples=20)
    assert torch.equal(torch.get_rng_state(), state)
    assert kid(real.flip(0), fake[torch.randperm(100)], subsets=5, subset_size=50, resamples=20) == found
    assert kid(real, fake, subsets=5, subset_size=50, resamples=20, seed=1).mean != found.mean
    assert kid(real, real + 1, subsets=5, subset_size=50, resamples=20).full.low > found.full.high


def test_squared_distances_far_from_the_origin():
    x, y = torch.randn(20, 9).double() + 1e6, torch.randn(30, 9).double() + 1e6
    torch.testing.assert_close(squared_distances(x, y), (x[:, None] - y).square().sum(2), rtol=1e-12, atol=1e-12)
    assert float(squared_distances(x, x).diagonal().min()) >= 0


@pytest.mark.parametrize("n", [1000, 4096])
def test_published_statistic_of_nothing(n):
    found = kid_vinay2022(torch.randn(n, 27) * 3, torch.randn(n, 27) * 3)
    assert found.mean == pytest.approx(2 / (n - 1), rel=0.05)
    assert (found.std, found.blocks) == (0, 1)


def test_published_statistic_of_a_set_with_itself():
    x = torch.randn(300, 27).double()
    total = float((16 / (16 + (x[:, None] - x).square().sum(2))).sum())
    assert kid_vinay2022(x, x).mean == pytest.approx(2 * total / (300**2 * 299), rel=1e-9)


def test_published_statistic_in_blocks(monkeypatch):
    real, fake = torch.randn(250, 5), torch.randn(250, 5)
    parts = [kid_vinay2022(real[i : i + 100], fake[i : i + 100]).mean for i in (0, 100, 200)]
    monkeypatch.setattr(kid_module, "BLOCK", 100)
    found = kid_vinay2022(real, fake)
    assert found.blocks == 3
    assert found.mean == pytest.approx(sum(parts) / 3)
    assert found.std == pytest.approx(float(torch.tensor(parts, dtype=torch.float64).std(correction=0)))
    with pytest.raises(DataError, match="the last of 2 notes or more; got 201 notes"):
        kid_vinay2022(real[:201], fake[:201])


def test_errors(monkeypatch):
    x = torch.randn(20, 4)
    with pytest.raises(DataError, match=r"^kid \(fake\): want at least 20 notes, got 19; evaluate more of them$"):
        kid(x, x[:19], subset_size=20)
    with pytest.raises(ValueError, match=r"^kid: want as many features for both, got 4 \(real\) and 3 \(fake\)$"):
        kid(x, x[:, :3], subset_size=20)
    with pytest.raises(DataError, match="want as many fake notes as real ones, got 19 and 20"):
        kid_vinay2022(x, x[:19])
    monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
    with pytest.raises(ConfigError, match=r"KID needs torchmetrics; run: pip install torchmetrics$"):
        kid(x, x, subset_size=20)
