"""NDB against scipy's tests, on planted and on equal sets."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import torch

from mars.errors import ConfigError, DataError
from mars.evaluate.metrics.ndb import COMPONENTS, different_bins, fit_bins, fit_bins_vinay2022, jensen_shannon, p_values

FITS = [lambda x, k, **more: fit_bins(x, k, **({"runs": 2} | more)), fit_bins_vinay2022]
fits = pytest.mark.parametrize("fit", FITS, ids=["standard", "vinay2022"])


def test_z_test_is_the_chi_squared_test():
    a, b = torch.randint(1, 60, (8,)), torch.randint(1, 90, (8,))
    n, m = int(a.sum()), int(b.sum())
    expected = [
        scipy.stats.chi2_contingency([[x, n - x], [y, m - y]], correction=False).pvalue
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    np.testing.assert_allclose(p_values(a, b).numpy(), expected, rtol=1e-9)


def test_bins_empty_in_both_are_no_different():
    found = p_values(torch.tensor([5, 0, 5]), torch.tensor([0, 0, 9]))
    assert found[1] == 1
    assert bool(found.isfinite().all())
    assert p_values(torch.tensor([7, 0]), torch.tensor([9, 0])).tolist() == [1, 1]


def test_jensen_shannon_is_scipys():
    a, b = torch.randint(0, 30, (12,)), torch.randint(0, 30, (12,))
    expected = scipy.spatial.distance.jensenshannon(a.numpy(), b.numpy()) ** 2
    assert float(jensen_shannon(a, b)) == pytest.approx(expected, rel=1e-9)


def modes(n: int, d: int, count: int = 30) -> torch.Tensor:
    centres = torch.randn(count, d, generator=torch.Generator().manual_seed(9)) * 3
    return centres[torch.randint(count, (n,))] + torch.randn(n, d)


@fits
def test_the_reference_itself_is_no_different(fit):
    reference = modes(600, 12)
    found = different_bins(fit(reference, 20), reference)
    assert (found.ratio, found.divergence) == (0, 0)
    assert (found.bins, found.reference, found.notes) == (20, 600, 600)


@fits
def test_one_mode_is_different_in_nearly_all_bins(fit):
    reference = modes(3000, 12)
    found = different_bins(fit(reference, 100), reference[:1].repeat(3000, 1))
    assert found.ratio > 0.9
    assert 0.5 < found.divergence < np.log(2)


@fits
def test_equal_distributions_are_different_in_few_bins(fit):
    found = different_bins(fit(modes(4096, 12), 100), modes(4096, 12))
    assert 0 <= found.ratio <= 0.12


def test_a_lost_mode_is_counted():
    centres = 20 * torch.eye(10)
    reference = centres[torch.arange(2000) % 10] + torch.randn(2000, 10)
    notes = centres[torch.arange(1800) % 9] + torch.randn(1800, 10)  # the tenth is lost
    found = different_bins(fit_bins(reference, 10, runs=3), notes)
    # 200 of 2000 against 0 is different at any level, 200 of 2000 against 200 of 1800 (z = 1.1) is not
    assert set(found.ratios) == {0.1}
    assert found.ratio_std == pytest.approx(0, abs=1e-12)


def test_standard_depends_on_contents_and_seed_alone():
    reference, notes = modes(800, 12), modes(500, 12)
    found = different_bins(fit_bins(reference, 30, runs=3), notes)
    assert len(found.ratios) == 3
    shuffled = fit_bins(reference[torch.randperm(800)], 30, runs=3)
    assert different_bins(shuffled, notes.flip(0)) == found
    assert different_bins(fit_bins(reference, 30, runs=3, seed=1), notes) != found
    assert found.ratio == pytest.approx(sum(found.ratios) / 3)
    assert found.ratio_std == pytest.approx(float(np.std(found.ratios, ddof=1)))


def test_bins_of_many_dimensions_are_made_in_principal_components():
    directions = torch.linalg.qr(torch.randn(400, 6)).Q.T
    reference = modes(900, 6) @ directions + 0.01 * torch.randn(900, 400)
    bins = fit_bins(reference, 20, runs=2)
    assert bins.centres.shape == (2, 20, COMPONENTS)
    assert bins.explained > 0.99
    assert different_bins(bins, reference).ratio == 0
    off = modes(900, 6) @ directions
    assert different_bins(bins, off).ratio < 0.2
    assert different_bins(bins, off + 10 * directions[0]).ratio > 0.5
    assert different_bins(fit_bins(reference.flip(0), 20, runs=2), off) == different_bins(bins, off)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_notes_of_any_precision(dtype):
    reference, notes = modes(300, 400).bfloat16().float(), modes(200, 400).bfloat16().float()
    bins = fit_bins(reference, 10, runs=1)
    assert different_bins(bins, notes.to(dtype)).ratios == different_bins(bins, notes).ratios
    assert fit_bins(reference.to(dtype), 10, runs=1).counts.sum() == 300


def test_notes_that_are_all_alike_make_no_bins():
    for d in (5, 300):
        with pytest.raises(DataError, match="want at least 10 different reference notes, got 1"):
            fit_bins(torch.ones(50, d), 10, runs=1)


def test_vinay2022_is_the_published_computation():
    """Against k-means with as many starts, centres and distances in numpy, and scipy's normal distribution."""
    reference, notes = modes(400, 20), modes(300, 20) + 0.3
    bins = fit_bins_vinay2022(reference, 15)
    x, y = reference.double().numpy()[:, bins.projection], notes.double().numpy()[:, bins.projection]
    label = scipy.spatial.distance.cdist(x, bins.centres[0].numpy()).argmin(1)
    centres = np.stack([x[label == i].mean(0) for i in range(15)])
    p = np.bincount(label, minlength=15) / 400
    q = np.bincount(scipy.spatial.distance.cdist(y, centres).argmin(1), minlength=15) / 300
    pooled = (400 * p + 300 * q) / 700
    z = (p - q) / np.sqrt(pooled * (1 - pooled) * (1 / 400 + 1 / 300))
    different = 2 * scipy.stats.norm.cdf(-np.abs(z)) < 0.05
    found = different_bins(bins, notes)
    assert found.ratio == pytest.approx(different.mean())
    assert 0 < found.ratio < 1
    assert different_bins(fit_bins_vinay2022(reference, 15), notes) == found


def test_vinay2022_takes_a_sixth_of_many_dimensions():
    reference = modes(300, 1201)
    bins = fit_bins_vinay2022(reference, 10)
    assert len(bins.projection) == len(set(bins.projection.tolist())) == 200
    assert 0 < bins.explained < 0.3
    assert torch.equal(bins.projection, fit_bins_vinay2022(reference, 10).projection)
    assert not torch.equal(bins.projection, fit_bins_vinay2022(reference, 10, seed=1).projection)
    assert len(fit_bins_vinay2022(reference[:, :1000], 10).projection) == 1000
    part = reference[:, bins.projection].double()
    label = (part[:, None] - bins.centres[0]).square().sum(2).argmin(1)
    torch.testing.assert_close(torch.stack([part[label == i].mean(0) for i in range(10)]), bins.centres[0])


@fits
def test_errors(fit, monkeypatch):
    with pytest.raises(DataError, match="want at least 20 notes, got 19; evaluate more of them"):
        fit(torch.randn(19, 3), 20)
    with pytest.raises(DataError, match=r"want at least 20 different reference notes, got 7; use more, or fewer bins$"):
        fit(torch.randn(7, 3).repeat(4, 1), 20)
    bins = fit(torch.randn(30, 3), 5)
    with pytest.raises(ValueError, match="want 3 features as the bins have, got 4"):
        different_bins(bins, torch.randn(9, 4))
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ConfigError, match=r"NDB needs scikit-learn; run: pip install scikit-learn$"):
        fit(torch.randn(30, 3), 5)
