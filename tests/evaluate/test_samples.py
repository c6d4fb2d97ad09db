"""Checks of samples and the order that depends on nothing but them."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity

from mars.errors import DataError
from mars.evaluate.samples import canonical, canonical_order, checked


@pytest.mark.parametrize(
    "samples",
    [
        torch.randn(50, 7, 3, generator=torch.Generator().manual_seed(1)),
        torch.eye(9),  # every sum alike
        torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).repeat(3, 1),  # copies
        torch.zeros(6, 2),
    ],
    ids=["distinct", "equal sums", "copies", "silence"],
)
def test_canonical_order_forgets_the_order_of_the_input(samples):
    shuffled = samples[torch.randperm(len(samples))]
    assert torch.equal(canonical(samples), canonical(shuffled))
    assert sorted(canonical_order(samples).tolist()) == list(range(len(samples)))


def test_rounding_moves_few_samples():
    samples = torch.randn(1000, 64)
    other = samples * (1 + 1e-7 * torch.randn_like(samples))
    moved = canonical_order(samples) != canonical_order(other)
    assert int(moved.sum()) < 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_half_precision_becomes_float32(dtype):
    samples = torch.eye(6, dtype=dtype).repeat(2, 1)
    found = checked("kid", samples, "notes", "features")
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(found, samples.to(found.dtype))
    assert canonical(found).dtype == torch.float64


def test_no_second_copy_is_made_of_many_samples():
    samples = torch.ones(2000, 1000)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        canonical_order(checked("ndb", samples, "notes", "features"))
    assert max(event.self_cpu_memory_usage for event in profile.events()) < samples.nbytes / 2


def test_checked_says_what_was_wanted():
    with pytest.raises(ValueError, match=r"^kid: want floating-point \(notes, features\), got torch.float32 \(3,\)$"):
        checked("kid", torch.zeros(3), "notes", "features")
    with pytest.raises(ValueError, match=r"got torch.int64 \(3, 2\)$"):
        checked("kid", torch.zeros(3, 2, dtype=torch.long), "notes", "features")
    with pytest.raises(DataError, match=r"^kid: want at least 4 notes, got 3; evaluate more of them$"):
        checked("kid", torch.zeros(3, 2), "notes", "features", minimum=4)
    bad = torch.zeros(3, 2)
    bad[1, 0], bad[2, 1] = torch.inf, torch.nan
    with pytest.raises(DataError, match=r"^kid: 2 of 3 notes hold NaN or infinity; leave them out or repair them$"):
        checked("kid", bad, "notes", "features")
