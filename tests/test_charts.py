"""Charts: what they show, and that any values can be drawn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mars import charts


def test_buckets_keep_mean_and_range():
    points = [(s, None if s == 5 else float(s % 10)) for s in range(1000)]
    found = charts.buckets(points, 100)
    assert len(found) == 100
    assert (found[1].step, found[1].mean, found[1].low, found[1].high) == (14.5, 4.5, 0, 9)
    assert found[0].mean == pytest.approx((45 - 5) / 9)
    assert charts.buckets([(1, None), (2, None)], 1) == [charts.Bucket(1.5, None, None, None)]


finite = st.floats(-1e12, 1e12, allow_nan=False)


@given(st.lists(st.none() | finite, min_size=1, max_size=30), st.booleans())
def test_any_curve_can_be_drawn(values, log):
    drawn = charts.line_chart("t", "u", [charts.Curve("c", list(enumerate(values)))], log=log)
    assert (drawn == "") == all(v is None for v in values)
    assert "nan" not in drawn.replace("finan", "")
    assert "inf" not in drawn


@given(st.floats(1e-9, 1e9), st.floats(1.001, 1e9), st.booleans())
def test_ticks_are_round_and_within(low, ratio, log):
    axis = charts.Axis(low, low * ratio, 0, 100, log and ratio >= 20)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 12
    assert ticks == sorted(ticks)
    assert all(-0.01 <= axis(t) <= 100.01 for t in ticks)
