"""The pitch of a note by YIN (de Cheveigné and Kawahara 2002), to a cent or so where it is steady."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from mars.data.pitch import difference

Samples = npt.NDArray[np.floating]  # (n,), full scale 1

LOWEST, HIGHEST = 25.0, 4200.0  # Hz that are looked for: those of a piano
THRESHOLD = 0.15  # of the normalised difference below which a period is taken
APERIODIC = 0.5  # ... above which a frame has none
_WINDOW = 0.13  # s that are compared
_FRAMES = 24
_QUIET = 0.03  # of the loudest frame: quieter ones are left out


def measured(samples: Samples, rate: int) -> float | None:
    """Return the pitch as a MIDI number with a fraction, the median over the loud frames; None where there is none."""
    window, longest = round(_WINDOW * rate), math.ceil(rate / LOWEST)
    starts = np.linspace(0, max(len(samples) - window - longest, 0), _FRAMES).astype(int)
    frames = [samples[start : start + window + longest].astype(np.float64) for start in dict.fromkeys(starts.tolist())]
    frames = [frame for frame in frames if len(frame) == window + longest]
    levels = [float(np.square(frame).mean()) ** 0.5 for frame in frames]
    if not frames or not max(levels) > 0:
        return None
    loud = [frame for frame, level in zip(frames, levels, strict=True) if level >= _QUIET * max(levels)]
    periods = [period for frame in loud if (period := _period(frame, window, rate)) is not None]
    if len(periods) < len(loud) / 2:
        return None
    return 69 + 12 * math.log2(rate / float(np.median(periods)) / 440)


def _period(frame: npt.NDArray[np.float64], window: int, rate: int) -> float | None:
    """Return the samples of a period, with a fraction; None where nothing repeats."""
    (squares,) = difference(frame[None], window)
    lags = np.arange(1, len(squares))
    normalised = np.ones(len(squares))
    normalised[1:] = squares[1:] * lags / np.maximum(squares[1:].cumsum(), 1e-12)
    first = max(int(rate / HIGHEST), 2)
    dips = np.flatnonzero((normalised[1:-1] <= normalised[:-2]) & (normalised[1:-1] < normalised[2:])) + 1
    dips = dips[dips >= first]
    if not len(dips) or normalised[dips].min() > APERIODIC:
        return None
    below = dips[normalised[dips] < THRESHOLD]
    period = _vertex(squares, int(below[0] if len(below) else dips[normalised[dips].argmin()]))
    times = 1
    while 2 * times * period < len(squares) - 2:  # many periods are measured more exactly than one
        times *= 2
        guess = times * period
        near = slice(max(round(guess - period / 4), 1), round(guess + period / 4) + 1)
        lowest = near.start + int(squares[near].argmin())
        if not 0 < lowest < len(squares) - 1:
            break
        period = _vertex(squares, lowest) / times
    return period


def _vertex(values: npt.NDArray[np.float64], at: int) -> float:
    """Return where the parabola through a dip and its neighbours is lowest."""
    before, here, after = values[at - 1 : at + 2]
    bend = before - 2 * here + after
    return at + (0.5 * (before - after) / bend if bend > 0 else 0.0)
