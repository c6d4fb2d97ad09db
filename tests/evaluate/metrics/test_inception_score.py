"""Inception Score against torchmetrics and closed forms; the published running mean against its definition."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torchmetrics.image.inception

from mars.errors import DataError
from mars.evaluate.metrics import inception_score as module
from mars.evaluate.metrics.inception_score import inception_score, inception_score_vinay2022
from mars.evaluate.samples import canonical


def sure(classes: int, notes: int) -> torch.Tensor:
    """Logits of a network that is sure of its class, the classes in turn."""
    return 1000.0 * torch.eye(classes).repeat(notes // classes, 1)


def by_class(classes: int = 27, notes: int = 2700) -> torch.Tensor:
    """Logits of notes sorted by class, none of them quite sure."""
    label = torch.arange(notes) * classes // notes
    return 6.0 * torch.nn.functional.one_hot(label, classes) + torch.randn(notes, classes)


def test_closed_forms():
    found = inception_score(sure(27, 2700))
    assert found.full.value == pytest.approx(27, rel=1e-12)
    assert found.classes == 27
    same = inception_score(torch.randn(1, 27).expand(100, 27))
    assert (same.mean, same.std, same.full.value) == pytest.approx((1, 0, 1), abs=1e-12)
    assert inception_score_vinay2022(torch.zeros(100, 27)).mean == pytest.approx(1, abs=1e-4)
    assert inception_score_vinay2022(sure(10, 100)).mean == pytest.approx(10, rel=1e-4)


def test_splits_are_those_of_torchmetrics():
    logits = torch.randn(500, 12) * 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps every feature
        metric = torchmetrics.image.inception.InceptionScore(torch.nn.Identity(), splits=10)
    metric.update(canonical(logits))
    torch.manual_seed(2020)
    mean, std = metric.compute()
    found = inception_score(logits)
    assert (found.mean, found.std) == pytest.approx((float(mean), float(std)), rel=1e-12)


def test_depends_on_contents_and_seed_alone():
    logits = by_class()
    state = torch.get_rng_state()
    found = inception_score(logits)
    assert torch.equal(torch.get_rng_state(), state)
    assert inception_score(logits[torch.randperm(len(logits))]) == found
    assert inception_score(logits, seed=1).mean != found.mean
    assert found.mean > 0.9 * found.full.value  # split without a shuffle it would be below 3, the classes of a split
    assert found.full.low < found.full.value < found.full.high


def test_published_number_is_the_mean_of_running_scores(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 230)
    logits = torch.randn(500, 9).double() * 2
    readings = []
    for block in (logits[:230], logits[230:460]):  # the last 40 are left out
        for end in (50, 100, 150, 200, 230):
            p = block[:end].softmax(1)
            marginal = p.mean(0)
            readings.append(math.exp(float((p * (p.log() - (marginal + 1e-6).log())).sum(1).mean())))
    found = inception_score_vinay2022(logits)
    assert found.notes == 460
    assert found.mean == pytest.approx(sum(readings) / 10, rel=1e-9)
    assert found.std == pytest.approx(float(torch.tensor(readings, dtype=torch.float64).std(correction=0)), rel=1e-9)


def test_published_number_depends_on_the_order_of_files():
    logits = by_class()
    full = inception_score(logits).full.value
    assert inception_score_vinay2022(logits).mean < 0.7 * full
    assert inception_score_vinay2022(logits[torch.randperm(len(logits))]).mean == pytest.approx(full, rel=0.05)


def test_errors():
    with pytest.raises(DataError, match=r"^inception_score: want at least 20 notes, got 19; evaluate more of them$"):
        inception_score(torch.zeros(19, 5))
    with pytest.raises(DataError, match="1 of 30 notes hold NaN"):
        inception_score(torch.zeros(30, 5).index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(DataError, match="want at least 1 notes, got 0"):
        inception_score_vinay2022(torch.zeros(0, 5))
