"""A note cut to be played by a sampler: trimmed, faded, looped where it sustains, at an even level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mars.instrument.pitch import Samples

PEAK = 10 ** (-1 / 20)  # of every sample: -1 dB
ONSET, END = 10 ** (-50 / 20), 10 ** (-60 / 20)  # of the peak: where a note begins and ends
BEFORE, FADE_IN, FADE_OUT = 0.002, 0.001, 0.05  # s
LOUD = 1.0  # s from its onset over which a note's level is measured
# A loop is looked for from SETTLED s on, lasts LOOP s at least, and is blended with what is before it over BLEND s.
SETTLED, LOOP, BLEND = 0.4, 0.4, 0.2
ALIKE = 0.4  # correlation of both ends of a loop, at least
STEADY = 1.0  # dB between their levels, at most


@dataclass(frozen=True)
class Sample:
    """What a sampler plays."""

    samples: npt.NDArray[np.float32]  # (n,)
    level: float  # dB full scale, root mean square from the onset
    loop: tuple[int, int] | None = None  # first and last sample, both played; None: it dies away


def cut(samples: Samples, rate: int) -> Sample:
    """Return the sample of a note (n,). Raises `ValueError` where there is no sound."""
    x = np.asarray(samples, np.float64)
    peak = float(np.abs(x).max(initial=0.0))
    if not peak > 0:
        raise ValueError("cut: the note is silent")
    x = x * (PEAK / peak)
    onset = max(int(np.argmax(np.abs(x) >= ONSET * PEAK)) - round(BEFORE * rate), 0)
    envelope = _envelope(x, round(0.02 * rate))
    end = int(np.flatnonzero(envelope >= END * PEAK)[-1]) + 1
    x = x[onset : max(end, onset + round(FADE_OUT * rate))]
    fade_in = min(round(FADE_IN * rate), len(x) // 4)
    x[:fade_in] *= _rise(fade_in)
    loop = _loop(x, rate)
    if loop is None:
        fade_out = min(round(FADE_OUT * rate), len(x) // 4)
        x[len(x) - fade_out :] *= _rise(fade_out)[::-1]
    else:
        first, last = loop
        blend = min(round(BLEND * rate), first, last + 1 - first)
        share, old, new = _rise(blend), x[last + 1 - blend : last + 1], x[first - blend : first]
        alike = float(old @ new) / max(float(np.linalg.norm(old) * np.linalg.norm(new)), 1e-12)
        power = np.square(1 - share) + np.square(share) + 2 * share * (1 - share) * alike  # of the mix
        x[last + 1 - blend : last + 1] = ((1 - share) * old + share * new) / np.sqrt(np.maximum(power, 0.25))
        x *= PEAK / max(float(np.abs(x).max()), PEAK)
        x = np.concatenate([x[: last + 1], x[first : first + 16]])  # for players that interpolate past the end
    loud = float(np.sqrt(np.square(x[: round(LOUD * rate)]).mean()))
    return Sample(x.astype(np.float32), 20 * float(np.log10(loud)), loop)


def _loop(x: Samples, rate: int) -> tuple[int, int] | None:
    """Return the first and last sample of a part that can be repeated; None if there is none.

    It ends shortly before the note is let go, and begins where the sound is most like that at its end.
    """
    settled, window, shortest = round(SETTLED * rate), round(0.06 * rate), round(LOOP * rate)
    envelope = _envelope(x, round(0.05 * rate))
    level = 20 * np.log10(np.maximum(envelope, 1e-9))
    if len(x) < settled + shortest + window:
        return None
    held = np.flatnonzero(level >= np.median(level[settled : settled + shortest]) - 6)
    end = int(held[-1]) - round(0.1 * rate)  # one past the last sample
    starts = np.arange(settled, end - shortest)
    if not len(starts):
        return None
    steady = np.abs(level[starts] - level[end]) <= STEADY
    target = x[end - window : end + window]
    if len(target) < 2 * window:
        return None
    found = np.lib.stride_tricks.sliding_window_view(x, 2 * window)[starts - window]
    alike = (found @ target) / np.maximum(np.linalg.norm(found, axis=1) * np.linalg.norm(target), 1e-12)
    alike[~steady] = -1
    if alike.max() < ALIKE:
        return None
    # The longest of those that are about as good as the best: a longer loop is heard less as one.
    first = int(starts[np.flatnonzero(alike >= alike.max() - 0.01)[0]])
    return first, end - 1


def _envelope(x: Samples, window: int) -> npt.NDArray[np.float64]:
    """Return the root mean square around every sample, as long as x."""
    power = np.convolve(np.square(x), np.full(window, 1 / window), "same")
    return np.sqrt(np.maximum(power[: len(x)], 0))


def _rise(count: int) -> npt.NDArray[np.float64]:
    """Return weights (count,) that rise smoothly from 0 to 1."""
    return 0.5 - 0.5 * np.cos(np.pi * (np.arange(count) + 0.5) / max(count, 1))
