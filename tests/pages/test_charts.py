"""Charts: what they show, and that any values can be drawn."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mars.pages import charts


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


@given(st.lists(st.tuples(finite, st.none() | st.tuples(finite, finite)), max_size=5))
def test_any_bars_can_be_drawn(values):
    bars = [charts.Bar("b", value, *((None, None) if rest is None else sorted(rest))) for value, rest in values]
    drawn = charts.bar_chart("t", "", bars)
    assert (drawn == "") == (not bars)
    assert "nan" not in drawn
    assert "inf" not in drawn
    assert drawn.count('class="bar"') == len(bars)
    for start, width in re.findall(r'<rect class="bar" x="([-\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn):
        assert charts.NAMES - 0.1 <= float(start) <= float(start) + float(width) <= charts.WIDTH - charts.VALUES + 1.1


def test_bars_are_as_long_as_their_values():
    drawn = charts.bar_chart("t", "", [charts.Bar("a", 4.0, 3.0, 5.0), charts.Bar("b", 2.0), charts.Bar("c", -1.0)])
    widths = [float(width) for width in re.findall(r'class="bar" x="[\d.]+" y="\d+" width="([\d.]+)"', drawn)]
    assert widths == pytest.approx([4 * widths[2], 2 * widths[2], widths[2]], abs=0.2)
    assert drawn.count('class="whisker"') == 1
    assert 'aria-label="t. a: 4, interval 3 to 5. b: 2. c: -1."' in drawn
