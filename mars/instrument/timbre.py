"""How alike two notes sound, whatever their pitches.

A note is described by the levels, in dB below its loudest, of bands that lie around its partials, at four times: the
attack, and three stretches of what follows. Of 242 rendered notes of 53 instruments, pairs at most an octave apart:
those of one instrument are nearer to each other than those of two instruments of a family in 91 of 100 comparisons,
and than those of any two instruments in 97; with a mel cepstrum at the same times it is 83 and 93.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from mars.instrument.pitch import Samples

BANDS = (0.0, 0.5, 1.5, 2.5, 3.5, 4.5, 6.5, 9.5)  # edges, in multiples of the fundamental: 0.5 to 1.5 is the first
TIMES = (0.0, 0.08, 0.4, 1.2, 2.8)  # s: edges
FLOOR = -80.0  # dB
_WINDOW, _HOP = 0.256, 0.032  # s


def timbre(samples: Samples, rate: int, pitch: float) -> npt.NDArray[np.float64]:
    """Return the levels in dB (times, bands) of a note of this pitch, a MIDI number."""
    size, hop = round(_WINDOW * rate), round(_HOP * rate)
    count = round(TIMES[-1] / _HOP)
    padded = np.zeros(count * hop + size)
    kept = samples[: len(padded) - size // 2]
    padded[size // 2 : size // 2 + len(kept)] = kept
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop][:count] * np.hanning(size)
    power = np.square(np.abs(np.fft.rfft(frames)))
    partial = np.arange(power.shape[1]) * rate / size / (440 * 2 ** ((pitch - 69) / 12))
    bands = [power[:, (partial >= a) & (partial < b)].sum(1) for a, b in itertools.pairwise(BANDS)]
    level = 10 * np.log10(np.maximum(np.stack(bands, 1), 1e-12))
    level = np.maximum(level - level.max(), FLOOR)
    edges = [round(time / _HOP) for time in TIMES]
    return np.stack([level[a : max(b, a + 1)].mean(0) for a, b in itertools.pairwise(edges)])


def distance(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Return the root mean square difference of two timbres in dB."""
    return float(np.sqrt(np.square(a - b).mean()))
