"""Fréchet distance against closed forms, scipy and torchmetrics; FAD's bias and its extrapolation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.profiler import ProfilerActivity
from torchmetrics.image.fid import FrechetInceptionDistance

from mars.errors import DataError
from mars.evaluate.bootstrap import resample_counts
from mars.evaluate.metrics.frechet import Moments, _resampled, fad, fad_infinity, frechet_distance


def moments(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, d).double() @ torch.randn(d, d).double() + torch.randn(d)
    return x.mean(0), x.T.cov()


def test_diagonal_gaussians():
    mean_a, mean_b = torch.randn(2, 6).double()
    sd_a, sd_b = torch.rand(2, 6).double() + 0.1
    expected = float((mean_a - mean_b).square().sum() + (sd_a - sd_b).square().sum())
    assert frechet_distance(mean_a, sd_a.square().diag(), mean_b, sd_b.square().diag()) == pytest.approx(expected)


@pytest.mark.parametrize("n", [20, 64, 4000], ids=["fewer samples than features", "few", "many"])
def test_agrees_with_other_forms(n):
    (mean_a, cov_a), (mean_b, cov_b) = moments(n, 48), moments(n, 48)
    found = frechet_distance(mean_a, cov_a, mean_b, cov_b)
    rest = float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace())
    assert found == pytest.approx(rest - 2 * float(torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()), rel=1e-6)
    assert found == pytest.approx(frechet_distance(mean_b, cov_b, mean_a, cov_a), rel=1e-6)
    if n > 48:
        root = scipy.linalg.sqrtm((cov_a @ cov_b).numpy())
        assert found == pytest.approx(rest - 2 * float(root.real.trace()), rel=1e-6)


@pytest.mark.parametrize("n", [20, 300])
def test_of_a_set_with_itself(n):
    mean, cov = moments(n, 64)
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-4 * float(cov.trace())


def test_constant_features():
    frames = torch.ones(50, 2, 8)
    assert fad(frames, frames).estimate.value == 0
    assert fad(frames, frames + 1).estimate.value == pytest.approx(8)


def test_moments_of_parts_are_those_of_the_whole():
    frames = torch.randn(500, 6).double() * 3 + 1000
    whole = Moments.of(frames)
    parts = Moments.of(frames[:7]) + Moments.of(frames[7:8]) + Moments.of(frames[8:])
    assert parts.count == whole.count == 500
    torch.testing.assert_close(parts.mean, frames.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(parts.covariance, frames.T.cov(), rtol=1e-10, atol=1e-10)
    with pytest.raises(DataError, match="covariance: want at least 2 frames, got 1"):
        _ = Moments.of(frames[:1]).covariance


def test_fad_is_torchmetrics_on_frames():
    real, fake = torch.randn(40, 7, 16), torch.randn(30, 5, 16) * 1.2 + 0.3
    identity = torch.nn.Identity()
    identity.num_features = 16
    metric = FrechetInceptionDistance(identity)
    metric.update(real.double().flatten(0, 1), real=True)
    metric.update(fake.double().flatten(0, 1), real=False)
    found = fad(real, fake, resamples=20)
    assert found.estimate.value == pytest.approx(float(metric.compute()), rel=1e-6)
    assert (found.frames_real, found.frames_fake) == (280, 150)
    assert fad(real[torch.randperm(40)], fake.flip(0), resamples=20) == found


def test_resampled_moments_are_those_of_repeated_clips():
    clips = torch.randn(300, 3, 5).double() + 100
    counts = resample_counts(300, 4, seed=1)
    for row, actual in zip(counts, _resampled(clips, counts), strict=True):
        expected = Moments.of(clips.repeat_interleave(row.long(), dim=0).flatten(0, 1))
        assert actual.count == expected.count
        torch.testing.assert_close(actual.mean, expected.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(actual.scatter, expected.scatter, rtol=1e-9, atol=1e-9)


def test_fad_is_float64():
    real, fake = torch.randn(40, 2, 4), torch.randn(40, 2, 4) + 1
    moments = (Moments.of(x.double().flatten(0, 1)) for x in (real, fake))
    exact = frechet_distance(*(x for m in moments for x in (m.mean, m.covariance)))
    assert fad(real, fake, resamples=2).estimate.value == pytest.approx(exact, rel=1e-12)


def test_wide_features_need_no_more_memory_than_a_few_copies_of_them():
    clips = torch.randn(300, 1, 1000)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        list(_resampled(clips.double(), resample_counts(300, 2, seed=1)))
    assert max(event.self_cpu_memory_usage for event in profile.events()) <= 8 * 1000**2


def test_interval_of_fad_is_about_its_spread():
    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        level = torch.randn(2, 150, 1, 6)  # frames of a clip resemble each other
        return level[0] + 0.3 * torch.randn(150, 4, 6), level[1] + 0.3 * torch.randn(150, 4, 6) + 0.5

    found = [fad(*draw(), resamples=100).estimate for _ in range(30)]
    spread = float(torch.tensor([x.value for x in found]).std())
    assert sum(x.error for x in found) / 30 == pytest.approx(spread, rel=0.4)


def test_fad_infinity_takes_most_of_the_bias_back():
    d, clips = 32, 250
    sd = torch.linspace(1, 0.1, d)
    truth = 0.05
    plug_in, extrapolated, with_replacement = [], [], []
    for seed in range(4):
        real = torch.randn(20_000, 1, d) * sd
        fake = torch.randn(clips, 1, d) * sd
        fake[..., 0] += truth**0.5
        plug_in.append(fad(real, fake, resamples=2).estimate.value)
        extrapolated.append(fad_infinity(real, fake, seed=seed).value)
        target, points = Moments.of(real[:, 0]), []
        for size in (64, 80, 100, 130, 180, 250):
            drawn = [Moments.of(fake[torch.randint(clips, (size,)), 0]) for _ in range(8)]
            scores = [frechet_distance(target.mean, target.covariance, x.mean, x.covariance) for x in drawn]
            points.append((1 / size, sum(scores) / len(scores)))
        x, y = torch.tensor(points).double().T
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        with_replacement.append(float(y.mean() - slope * x.mean()))
    bias, rest, unmoved = (sum(v) / 4 - truth for v in (plug_in, extrapolated, with_replacement))
    assert bias > 0.1
    assert abs(rest) < 0.3 * bias
    assert unmoved == pytest.approx(bias, rel=0.25)


def test_fad_infinity_depends_on_contents_and_seed_alone():
    real, fake = torch.randn(100, 4, 8), torch.randn(90, 4, 8)
    found = fad_infinity(real, fake)
    assert fad_infinity(real.flip(0), fake[torch.randperm(90)]) == found
    assert fad_infinity(real, fake, seed=1) != found
    assert found.notes[0] == 18
    assert found.notes[-1] == 90
    assert found.distances[-1] == pytest.approx(fad(real, fake, resamples=2).estimate.value, rel=1e-9)
    slope, intercept = np.polyfit(1 / np.array(found.notes), found.distances, 1)
    assert (found.slope, found.value) == pytest.approx((slope, intercept), rel=1e-9)


def test_errors():
    clips = torch.randn(20, 2, 40)
    with pytest.raises(DataError, match=r"^fad_infinity: want at least 80 fake clips, got 20; generate more of them$"):
        fad_infinity(clips, clips)
    with pytest.raises(DataError, match=r"^fad \(fake\): 1 of 20 clips hold NaN"):
        fad(clips, clips.index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(ValueError, match=r"^fad: want as many features for both, got 40 \(real\), 39 \(fake\)$"):
        fad(clips, clips[..., :39])
    with pytest.raises(ValueError, match=r"want floating-point \(clips, frames, features\)"):
        fad(clips[0], clips)
