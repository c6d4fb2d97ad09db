"""The words in pages."""

from __future__ import annotations

import pytest

from mars.pages import html


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234567.0, "1,234,567"), (0.00012345, "1.23e-4"), (-3.14159, "-3.142"), (6e-5, "6e-5"), (3e12, "3e12")],
)
def test_numbers_are_short(value, text):
    assert html.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (12.345, "12.3"), (-0.00012345, "-1.2e-4"), (0.5, "0.5")]
)
def test_numbers_can_be_shorter(value, text):
    assert html.number(value, 3) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (90, "2 min"), (12_000, "3 h 20 min"), (5e5, "5 d 19 h")]
)
def test_durations_are_short(seconds, text):
    assert html.duration(seconds) == text
