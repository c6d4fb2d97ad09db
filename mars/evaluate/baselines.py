"""Sets of notes that every report measures beside the evaluated one: real notes, made worse or divided.

The anchor is that of Vinay and Lerch (ISMIR 2022): low-passed at 1 kHz and reduced to 8 bit. They state neither the
filter's type nor its order; here it is the Butterworth filter of order 4 (24 dB an octave), what audio programs and
`scipy.signal.butter` offer first, run forwards. It is quantised by rounding, without dither, which would hide the steps
under noise.
"""

from __future__ import annotations

import cmath
import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mars import audio
from mars.config import AudioConfig
from mars.errors import ConfigError, DataError
from mars.evaluate.sets import SAMPLE_RATE, SAMPLES, NoteSet
from mars.runtime import stream

REAL_VS_REAL, ORACLE, ANCHOR = "real-vs-real", "griffin-lim oracle", "anchor"  # rows of a report
CUTOFF, ORDER = 1000.0, 4  # Hz, where the filter is 3 dB down; of the filter
BITS = 8
STREAM = 6  # tells these random phases from other streams with the same seed


def anchor(notes: NoteSet) -> NoteSet:
    """Return the notes low-passed at 1 kHz and rounded to 8 bit, multiples of 1/128; the quietest may become silent."""
    return notes.mapped("anchor-butterworth4-1000Hz-8bit", lambda waveforms, _: quantise(low_pass(waveforms)))


def low_pass(waveforms: Tensor) -> Tensor:
    """Filter waveforms (B, samples) at 16 kHz with the Butterworth filter, made digital by the bilinear transform.

    Its response falls below 1e-16 within 256 samples, so the product of padded spectra is as good as the recursion.
    """
    samples = waveforms.shape[-1]
    padded = 1 << (samples + 255).bit_length()
    frequencies = torch.linspace(0, math.pi, padded // 2 + 1, dtype=torch.float64)
    s = 1j * (frequencies / 2).tan() / math.tan(math.pi * CUTOFF / SAMPLE_RATE)
    response = torch.ones_like(s)
    for k in range(ORDER):
        response /= s - cmath.exp(1j * math.pi * (2 * k + 1 + ORDER) / (2 * ORDER))  # a pole of the analogue filter
    filtered = torch.fft.irfft(torch.fft.rfft(waveforms.double(), padded) * response, padded)
    return filtered[..., :samples].to(waveforms.dtype)


def quantise(waveforms: Tensor) -> Tensor:
    """Round waveforms in [-1, 1] to 8 bit: 256 steps of 1/128 from -1."""
    half = 2 ** (BITS - 1)
    return (waveforms * half).round().clamp(-half, half - 1) / half


def griffin_lim_oracle(notes: NoteSet, config: AudioConfig, iterations: int = 32, seed: int = 0) -> NoteSet:
    """Return the notes as a perfect model would give them: their own magnitudes, and phases by Griffin-Lim.

    They pass through the normalised spectrogram and the CMX tensor of `config` and back. The random phases that
    Griffin-Lim starts from depend on the seed and the note's sound alone. A note that gets beyond full scale is made
    quieter, as in reconstruction.

    Raises:
        ConfigError: `config` is not at 16 kHz.
    """
    if config.sample_rate != SAMPLE_RATE:
        raise ConfigError(f"notes are evaluated at {SAMPLE_RATE} Hz, the model's are at {config.sample_rate} Hz")
    digest = hashlib.sha256(repr(config).encode()).hexdigest()[:16]

    def restored(waveforms: Tensor, keys: Sequence[str]) -> Tensor:
        magnitudes = audio.demultiplexed_magnitudes(audio.multiplexed(waveforms, config), config)
        signals = audio.griffin_lim(magnitudes, config, iterations, generators=phases(keys, seed))[:, :SAMPLES]
        return F.pad(audio.within_full_scale(signals), (0, SAMPLES - signals.shape[1]))

    return notes.mapped(f"griffin-lim-oracle-{digest}-{iterations}-seed{seed}", restored)


def phases(keys: Sequence[str], seed: int) -> list[torch.Generator]:
    """Return a generator of Griffin-Lim's first phases for each note, that depends on its key and the seed alone."""
    return [stream(seed, STREAM, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])) for key in keys]


def halves(notes: NoteSet, seed: int) -> tuple[NoteSet, NoteSet]:
    """Return two disjoint halves, drawn at random; which notes are in which does not depend on the order of the set.

    Of an odd number one note is left out.

    Raises:
        DataError: there are fewer than two notes.
    """
    half = len(notes) // 2
    if not half:
        raise DataError(f"want at least two notes to make two halves of, got {len(notes)} from {notes.source}")
    shuffled = notes.shuffled(seed)
    return shuffled.subset(range(half)), shuffled.subset(range(half, 2 * half))
