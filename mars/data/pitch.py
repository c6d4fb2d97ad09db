"""The pitch of a note, estimated from its sound, where nobody says what it is.

pYIN (Mauch and Dixon 2014) without its smoothing over time, since a note has one pitch: each frame's lags at which the
waveform repeats itself (YIN, de Cheveigné and Kawahara 2002) get the probability that one of YIN's thresholds would
choose them, and what the frames of a note say is added up over its semitones.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mars.data.notes import SILENT, Audio
from mars.labels import UNKNOWN

LOWEST, HIGHEST = 27.0, 4500.0  # Hz; a little beyond a piano's
HOP = 0.05  # s
QUIET = 0.03  # of the loudest frame's level; frames below it say nothing
SPAN = 0.75  # semitones on either side of the pitch, which a vibrato may fill
SURE = 0.5  # confidence below which a sound counts as having no pitch


def estimate(audio: Audio, sample_rate: int) -> tuple[int, float]:
    """The MIDI number of a note (samples,) and how sure that is, 0 to 1; `UNKNOWN` and 0 where it has no pitch.

    The confidence is the share of the note, by loudness, that repeats itself at that pitch.
    """
    longest = int(sample_rate / LOWEST) + 2
    frames = _frames(audio.astype(np.float64), 3 * longest, round(HOP * sample_rate))
    level = np.sqrt(np.square(frames).mean(1))
    heard = level > max(QUIET * level.max(initial=0.0), SILENT / 10)
    if not heard.any():
        return UNKNOWN, 0.0
    frames, level = frames[heard], level[heard]
    frame, lag, mass = _candidates(_normalised_difference(frames, longest), max(int(sample_rate / HIGHEST), 2))
    pitch = 69 + 12 * np.log2(sample_rate / lag / 440)
    weight = mass * level[frame] / level.sum()
    order = np.argsort(pitch)
    pitch, weight = pitch[order], weight[order]
    reached = np.concatenate([[0.0], np.cumsum(weight)])
    first, last = (np.searchsorted(pitch, pitch + span) for span in (-SPAN, SPAN))
    total = reached[last] - reached[first]
    if total.max(initial=0.0) < SURE:
        return UNKNOWN, 0.0
    best = int(total.argmax())
    near = slice(first[best], last[best])
    return round(float(np.average(pitch[near], weights=weight[near]))), float(min(total[best], 1.0))


def _frames(audio: npt.NDArray[np.float64], size: int, hop: int) -> npt.NDArray[np.float64]:
    """(n, size), every `hop` samples; one, padded, of audio that is shorter."""
    padded = np.pad(audio, (0, max(size - len(audio), 0)))
    return np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]


def difference(frames: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Return YIN's difference function (de Cheveigné and Kawahara 2002) of each frame (n, samples), (n, lags).

    That is the sum of squared differences between its first `window` samples and those a lag later, of every lag that
    the frame has room for.
    """
    longest = frames.shape[1] - window
    size = 1 << (frames.shape[1] + window).bit_length()
    spectrum = np.fft.rfft(frames, size)
    correlation = np.fft.irfft(spectrum * np.fft.rfft(frames[:, :window], size).conj(), size)[:, :longest]
    energy = np.cumsum(np.pad(np.square(frames), ((0, 0), (1, 0))), axis=1)
    shifted = energy[:, window : window + longest] - energy[:, :longest]
    return np.maximum(shifted[:, :1] + shifted - 2 * correlation, 0)


def _normalised_difference(frames: npt.NDArray[np.float64], longest: int) -> npt.NDArray[np.float64]:
    """YIN's cumulative mean normalised difference of each frame, (n, longest), by the lag."""
    squares = difference(frames, frames.shape[1] - longest)
    squares[:, 0] = 0
    mean = np.cumsum(squares, axis=1) / np.maximum(np.arange(longest), 1)
    return np.where(mean > 0, squares / np.maximum(mean, 1e-12), 1.0)


def _candidates(
    curve: npt.NDArray[np.float64], shortest: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The minima of the curves (n, lags): of each its frame, its lag in samples and the probability of its choice.

    A threshold chooses the first minimum below it; thresholds are distributed as Beta(2, 18), as in pYIN.
    """
    left, here, right = curve[:, :-2], curve[:, 1:-1], curve[:, 2:]
    low = (here < left) & (here <= right)
    low[:, : shortest - 1] = False
    bend = np.where(low, left - 2 * here + right, 1.0)  # of the parabola through the three, whose lowest point counts
    value = np.where(low, np.maximum(here - np.square(left - right) / (8 * bend), 0), np.inf)
    before = np.minimum.accumulate(np.pad(value, ((0, 0), (1, 0)), constant_values=1.0), axis=1)[:, :-1]
    frame, place = np.nonzero(value < before)
    mass = _below(before[frame, place]) - _below(value[frame, place])
    shift = ((left - right) / (2 * bend))[frame, place]
    return frame, place + 1 + shift, mass


def _below(threshold: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The distribution function of Beta(2, 18)."""
    x = np.clip(threshold, 0, 1)
    return 1 - (1 - x) ** 18 * (1 + 18 * x)
