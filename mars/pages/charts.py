"""Charts as inline SVG: curves over steps, heat maps of scales over steps, and bars.

Colours come from the page's style sheet, values on hover from `<title>` elements: no script is needed. A curve of many
points is drawn as the mean of as many buckets as there are pixels to tell apart, with the range of each behind it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

from mars.pages.html import number

BUCKETS = 250  # of a curve
HOVERS = 120  # of a chart: places that say their values
MARKED = 40  # points of a curve with at most so many are marked
CELLS = 80  # columns of a heat map

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 8, 42  # margins
BAR = 26  # height of a bar with the gap below
NAMES, VALUES = 116, 72  # margins of bars

Points = Sequence[tuple[int, float | None]]


@dataclass(frozen=True)
class Curve:
    """A curve: values by step, None where a step has none."""

    label: str
    points: Points
    colour: int = 1  # 1 to 3
    best: Literal["lowest", "highest"] | None = None  # which value is worth a mention


@dataclass(frozen=True)
class Bar:
    """A value with its interval."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: int = 0  # 1 to 3, or 0, which is pale


@dataclass(frozen=True)
class Bucket:
    """Neighbouring points; the numbers are None if none of them has one."""

    step: float
    mean: float | None
    low: float | None
    high: float | None


def buckets(points: Points, count: int = BUCKETS) -> list[Bucket]:
    """Gather the points into at most `count` buckets of neighbours."""
    size = max(-(-len(points) // count), 1)
    result = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        values = [v for _, v in part if v is not None]
        step = (part[0][0] + part[-1][0]) / 2
        if values:
            result.append(Bucket(step, sum(values) / len(values), min(values), max(values)))
        else:
            result.append(Bucket(step, None, None, None))
    return result


@dataclass(frozen=True)
class Axis:
    """Maps values in low..high to pixels first..last."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._position(self.low), self._position(self.high)
        return self.first + (self._position(value) - low) / (high - low) * (self.last - self.first)

    def _position(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, count: int = 5) -> list[float]:
        """Return about `count` round values within low..high."""
        low, high = self._position(self.low), self._position(self.high)
        if self.log:
            every = max(math.ceil((high - low) / count), 1)
            digits = (1,) if high - low > 2 else (1, 2, 5)
            exponents = [k for k in range(math.floor(low), math.ceil(high) + 1) if k % every == 0]
            values = [d * 10.0**k for k in exponents for d in digits]
        else:
            rough = (high - low) / count
            unit = 10.0 ** math.floor(math.log10(rough))
            width = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
            values = [k * width for k in range(math.floor(low / width), math.ceil(high / width) + 1)]
        near, far = sorted((self.first, self.last))
        return [t for t in values if near - 1e-3 <= self(t) <= far + 1e-3]


def line_chart(title: str, unit: str, curves: Sequence[Curve], *, log: bool = True) -> str:
    """Return a figure of curves over steps; empty if no point has a value.

    log: the values may be shown on a logarithmic axis, which is done where they are positive and far apart.
    """
    drawn = [(curve, buckets(curve.points)) for curve in curves]
    drawn = [(curve, points) for curve, points in drawn if any(b.mean is not None for b in points)]
    if not drawn:
        return ""
    extremes = [v for _, points in drawn for b in points for v in (b.low, b.high) if v is not None]
    x = Axis(0, max(curve.points[-1][0] for curve, _ in drawn) or 1, LEFT, WIDTH - RIGHT)
    y = _value_axis(min(extremes), max(extremes), log)
    parts = [_axes(x, y, unit + (", logarithmic" if y.log else ""))]
    parts += [_curve(f"c{curve.colour}", points, x, y) for curve, points in drawn]
    parts.append(_hovers(drawn, x))
    keys = "".join(f'<li class="c{curve.colour}">{escape(_summary(curve))}</li>' for curve, _ in drawn)
    spoken = f"{title}, {unit}, over steps. " + " ".join(f"{_summary(curve)}." for curve, _ in drawn)
    return _figure(title, spoken, HEIGHT, parts, f'<ul class="keys">{keys}</ul>')


def heat_map(
    title: str,
    unit: str,
    labels: Sequence[str],
    columns: Sequence[tuple[int, Sequence[float]]],
    low: float,
    high: float,
) -> str:
    """Return a figure of one row per label over steps; empty without columns.

    columns: (step, a value for each label). Colour grows from `low` to `high`, logarithmically if low is positive.
    """
    columns = [c for c in columns if len(c[1]) == len(labels)]
    if not columns:
        return ""
    every = -(-len(columns) // CELLS)
    columns = columns[::-1][::every][::-1]
    row = max(min(180 // len(labels), 26), 14)
    height = TOP + row * len(labels) + BOTTOM
    right = WIDTH - 52
    x = Axis(0, columns[-1][0] or 1, LEFT, right)
    edges = [0, *(step for step, _ in columns)]
    shade = Axis(max(low, 1e-9) if low > 0 else low, max(high, low * 1.01 + 1e-9), 0.06, 1, low > 0)
    bottom = height - BOTTOM
    parts = [_steps(x, bottom)]
    for place, label in enumerate(labels):
        top = TOP + place * row
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{top + row / 2 + 4:.1f}">{escape(label)}</text>')
        for (step, values), (before, after) in zip(columns, pairwise(edges), strict=True):
            value = values[place]
            opacity = shade(min(max(value, shade.low), shade.high))
            parts.append(
                f'<rect class="cell" x="{x(before):.1f}" y="{top}" width="{max(x(after) - x(before), 1):.1f}" '
                f'height="{row - 1}" fill-opacity="{opacity:.2f}">'
                f"<title>scale {escape(label)}, step {step:,}: {number(value)}</title></rect>"
            )
        last = number(columns[-1][1][place])
        parts.append(f'<text class="tick" x="{right + 6}" y="{top + row / 2 + 4:.1f}">{last}</text>')
    spoken = ", ".join(f"{label}: {number(v)}" for label, v in zip(labels, columns[-1][1], strict=True))
    scale = f'{unit}; <span class="ramp"></span> {number(low)} to {number(high)}{", logarithmic" if low > 0 else ""}'
    return _figure(title, f"{title} per scale at step {columns[-1][0]:,}. {spoken}.", height, parts, f"<p>{scale}</p>")


def bar_chart(title: str, below: str, bars: Sequence[Bar]) -> str:
    """Return a figure of bars from 0, with intervals as whiskers and values beside them; empty without bars."""
    if not bars:
        return ""
    extremes = [0.0, *(v for bar in bars for v in (bar.value, bar.low, bar.high) if v is not None)]
    low, high = min(extremes), max(extremes)
    margin = 0.03 * (high - low) or 1.0
    x = Axis(low - margin if low < 0 else 0.0, high + margin, NAMES, WIDTH - VALUES)
    bottom = TOP + BAR * len(bars)
    parts = []
    for tick in x.ticks(4):
        parts.append(f'<path class="grid" d="M{x(tick):.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text class="tick middle" x="{x(tick):.1f}" y="{bottom + 16}">{number(tick)}</text>')
    for place, bar in enumerate(bars):
        parts.append(_bar(bar, x, TOP + BAR * place))
    parts.append(f'<path class="axis" d="M{x(0):.1f} {TOP}V{bottom}"/>')
    spoken = f"{title}. " + " ".join(f"{bar.label}: {_stated(bar)}." for bar in bars)
    return _figure(title, spoken, bottom + 24, parts, f"<p>{escape(below)}</p>")


def _bar(bar: Bar, x: Axis, top: float) -> str:
    left, right = sorted((x(0), x(bar.value)))
    middle, height = top + BAR / 2, BAR - 10
    parts = [
        f"<title>{escape(f'{bar.label}: {_stated(bar)}')}</title>",
        f'<text class="tick end" x="{NAMES - 8}" y="{middle + 4}">{escape(bar.label)}</text>',
        f'<rect class="bar" x="{left:.1f}" y="{top + 5}" width="{max(right - left, 1):.1f}" height="{height}"/>',
    ]
    if bar.low is not None and bar.high is not None:
        ends = "".join(f"M{x(end):.1f} {middle - 5}v10" for end in (bar.low, bar.high))
        parts.append(f'<path class="whisker" d="M{x(bar.low):.1f} {middle}H{x(bar.high):.1f}{ends}"/>')
    parts.append(f'<text class="value" x="{WIDTH - VALUES + 6}" y="{middle + 4}">{number(bar.value)}</text>')
    return f'<g class="c{bar.colour}">{"".join(parts)}</g>'


def _stated(bar: Bar) -> str:
    """Describe a bar in words."""
    if bar.low is None or bar.high is None:
        return number(bar.value)
    return f"{number(bar.value)}, interval {number(bar.low)} to {number(bar.high)}"


def _figure(title: str, spoken: str, height: int, parts: Sequence[str], below: str) -> str:
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(spoken)}">{"".join(parts)}</svg>'
        f"<figcaption>{below}</figcaption></figure>"
    )


def _value_axis(low: float, high: float, log: bool) -> Axis:
    log = log and low > 0 and high / low >= 20
    if log:
        margin = (high / low) ** 0.04
        low, high = low / margin, high * margin
    else:
        margin = 0.04 * (high - low) or max(abs(high) * 0.1, 1e-6)
        low, high = (low - margin if low < 0 or low - margin > 0 else 0.0), high + margin
    return Axis(low, high, HEIGHT - BOTTOM, TOP, log)


def _axes(x: Axis, y: Axis, unit: str) -> str:
    parts = []
    for tick in y.ticks():
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{y(tick) + 4:.1f}">{number(tick)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="label" transform="translate(11 {middle}) rotate(-90)">{escape(unit)}</text>')
    return "".join(parts) + _steps(x, HEIGHT - BOTTOM)


def _steps(x: Axis, bottom: int) -> str:
    parts = [f'<path class="axis" d="M{x.first} {bottom}H{x.last}"/>']
    for tick in x.ticks():
        if tick == int(tick):
            name = f"{tick / 1000:g}k" if tick >= 10_000 else f"{tick:,.0f}"
            parts.append(f'<text class="tick middle" x="{x(tick):.1f}" y="{bottom + 16}">{name}</text>')
    parts.append(f'<text class="label" x="{(x.first + x.last) / 2:.1f}" y="{bottom + 35}">step</text>')
    return "".join(parts)


def _curve(name: str, points: Sequence[Bucket], x: Axis, y: Axis) -> str:
    runs: list[list[tuple[float, float, float, float]]] = [[]]  # without gaps
    for b in points:
        if b.mean is None or b.low is None or b.high is None:
            runs.append([])
        else:
            runs[-1].append((x(b.step), y(b.mean), y(b.low), y(b.high)))
    parts = []
    for run in filter(None, runs):
        if any(high != low for _, _, low, high in run):
            edge = [f"{a:.1f} {low:.1f}" for a, _, low, _ in run] + [f"{a:.1f} {high:.1f}" for a, *_, high in run[::-1]]
            parts.append(f'<path class="band {name}" d="M{"L".join(edge)}Z"/>')
        parts.append(f'<path class="line {name}" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b, *_ in run)}"/>')
        if len(points) <= MARKED or len(run) == 1:
            parts += [f'<circle class="{name}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b, *_ in run]
    return "".join(parts)


def _hovers(drawn: Sequence[tuple[Curve, Sequence[Bucket]]], x: Axis) -> str:
    """Return invisible columns that cover the chart and name the values nearest to them."""
    steps = sorted({b.step for _, points in drawn for b in points})
    steps = steps[:: -(-len(steps) // HOVERS)]
    edges = [x.low, *((a + b) / 2 for a, b in pairwise(steps)), x.high]
    parts = []
    for step, (before, after) in zip(steps, pairwise(edges), strict=True):
        lines = [f"step {step:,.0f}"]
        for curve, points in drawn:
            near = _nearest(points, step)
            if near.mean is None or near.low is None or near.high is None:
                lines.append(f"{curve.label}: not finite")
            else:
                spread = f" ({number(near.low)} to {number(near.high)})" if near.low < near.high else ""
                lines.append(f"{curve.label}: {number(near.mean)}{spread}")
        parts.append(
            f'<rect class="hover" x="{x(before):.1f}" y="{TOP}" width="{max(x(after) - x(before), 1):.1f}" '
            f'height="{HEIGHT - BOTTOM - TOP}"><title>{escape(chr(10).join(lines))}</title></rect>'
        )
    return "".join(parts)


def _nearest(points: Sequence[Bucket], step: float) -> Bucket:
    place = bisect_left(points, step, key=lambda b: b.step)
    return min(points[max(place - 1, 0) : place + 1], key=lambda b: abs(b.step - step))


def _summary(curve: Curve) -> str:
    """Describe a curve in words: its last value, and its best."""
    known = [(value, step) for step, value in curve.points if value is not None]
    words = f"{curve.label} {number(known[-1][0])}"
    if curve.best is not None:
        best, at = min(known) if curve.best == "lowest" else max(known)
        words += f", {curve.best} {number(best)} at step {at:,}"
    return words
