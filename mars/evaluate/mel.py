"""Log-mel spectrograms, errors between them and nearest neighbours among them (Vinay and Lerch 2022, Table 1).

The recipe is DiffWave's with librosa's mel filters: 16 kHz, 1024 samples a frame, 256 a hop, 80 Slaney bands of 20 to
8000 Hz, magnitudes, 20 log10 - 20 dB, 100 dB mapped to [0, 1]. An error of 1 is 100 dB. Many bins of a note lie on the
floor at 0, so the errors say more about the noise floor than about the partials.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mars.errors import ConfigError, DataError
from mars.evaluate.samples import finite
from mars.runtime import exact_float32, float64_device

SAMPLE_RATE = 16_000  # Hz
N_FFT, HOP, BANDS = 1024, 256, 80
LOW, HIGH = 20.0, 8000.0  # Hz
SHAPE = BANDS, 251  # of a note of 64,000 samples

_NOTES = 32  # transformed at a time
_CANDIDATES = 4  # neighbours by product whose distance is computed exactly


@dataclass(frozen=True, slots=True)
class MelErrors:
    """Mean squared and mean absolute error of each note, float64 (n,)."""

    mse: Tensor
    mae: Tensor


@dataclass(frozen=True, slots=True)
class Nearest:
    """Each query's nearest reference: its index int64 (n,) and the errors against it."""

    index: Tensor
    errors: MelErrors

    @property
    def distinct(self) -> int:
        """How many references are the nearest of any query; few of them for many queries are collapsed modes."""
        return len(self.index.unique())


def log_mel(waveform: Tensor) -> Tensor:
    """Compute log-mel spectrograms, float32 (B, 80, 1 + samples // 256) in [0, 1] of waveforms (B, samples) at 16 kHz.

    64,000 samples make 251 frames, centred, with zeros around the note; silence is 0 everywhere. The waveform is
    clipped to [-1, 1] first. Computed in float64 where the waveform is, or on the CPU if that is on MPS.

    Raises:
        ValueError: another shape or integers.
        DataError: a waveform holds NaN or infinity.
    """
    if waveform.ndim != 2 or not waveform.is_floating_point():
        raise ConfigError(f"log_mel: want floating-point (B, samples), got {waveform.dtype} {tuple(waveform.shape)}")
    waveform = waveform.to(float64_device(waveform.device))
    finite("log_mel", waveform, "notes")
    filters = filterbank().to(waveform.device)
    window = torch.hann_window(N_FFT, dtype=torch.float64, device=waveform.device)
    spectrograms = waveform.new_empty(len(waveform), BANDS, 1 + waveform.shape[1] // HOP, dtype=torch.float32)
    for start in range(0, len(waveform), _NOTES):
        notes = waveform[start : start + _NOTES].double().clamp(-1, 1)
        spectrum = torch.stft(notes, N_FFT, HOP, window=window, pad_mode="constant", return_complex=True)
        decibels = 20 * (filters @ spectrum.abs()).clamp_(min=1e-5).log10_() - 20
        spectrograms[start : start + _NOTES] = ((decibels + 100) / 100).clamp_(0, 1)
    return spectrograms


@lru_cache(maxsize=16)
def filterbank(
    sample_rate: int = SAMPLE_RATE, n_fft: int = N_FFT, bands: int = BANDS, low: float = LOW, high: float = HIGH
) -> Tensor:
    """Return triangular filters of unit area on Slaney's mel scale (1998), float64 (bands, n_fft / 2 + 1).

    Frequencies in Hz. The scale is linear below 1 kHz, 3 mel for 200 Hz, and logarithmic above, 27 mel for a factor
    of 6.4. The filters of `librosa.filters.mel`.
    """
    edges = _hertz(torch.linspace(_mel(low), _mel(high), bands + 2, dtype=torch.float64))
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    lower, centre, upper = (edges[i : i + bands, None] for i in range(3))
    triangles = torch.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre)).clamp(min=0)
    return triangles * 2 / (upper - lower)


def mel_errors(real: Tensor, fake: Tensor) -> MelErrors:
    """Compute the errors of log-mel spectrograms fake (n, bands, frames) against the originals real (n, bands, frames).

    Raises:
        ValueError: they do not pair up.
    """
    if real.shape != fake.shape or real.ndim != 3:
        raise ConfigError(f"mel_errors: want (n, bands, frames) twice, got {tuple(real.shape)}, {tuple(fake.shape)}")
    pairs = zip(real.flatten(1).split(_NOTES), fake.flatten(1).split(_NOTES), strict=True)
    parts = [_errors(a, b) for a, b in pairs]
    return MelErrors(torch.cat([mse for mse, _ in parts]), torch.cat([mae for _, mae in parts]))


@torch.no_grad()
def nearest(queries: Tensor, references: Tensor | Iterable[Tensor]) -> Nearest:
    """Find the reference with the least squared error for each query (n, bands, frames), without aligning in time.

    references: (m, bands, frames), or an iterable over blocks of them where they do not fit into memory. Both errors
    are those against the one reference.

    A product of matrices finds the best few of a block; their errors are then computed from the pairs in float64,
    because the product loses about four digits. Equal ones among those few: the lowest index.

    Raises:
        ValueError: other shapes.
        DataError: no references, or a spectrogram that holds NaN or infinity.
    """
    if queries.ndim != 3:
        raise ConfigError(f"nearest: want queries (n, bands, frames), got {tuple(queries.shape)}")
    queries = queries.to(float64_device(queries.device), torch.promote_types(queries.dtype, torch.float32))
    finite("nearest (queries)", queries, "notes")
    n, device = len(queries), queries.device
    index = torch.full((n,), -1, device=device)
    mse, mae = torch.full((2, n), torch.inf, dtype=torch.float64, device=device)
    start = 0
    for block in references.split(4096) if isinstance(references, Tensor) else references:
        if block.shape[1:] != queries.shape[1:]:
            raise ConfigError(f"nearest: want references {('m', *queries.shape[1:])}, got {tuple(block.shape)}")
        flat = block.to(device, queries.dtype).flatten(1)
        finite("nearest (references)", flat, "notes")
        squares = flat.square().sum(1)
        for rows in torch.arange(n, device=device).split(64):
            part = queries[rows].flatten(1)
            with exact_float32():
                scores = torch.addmm(squares, part, flat.T, alpha=-2)
            candidates = scores.topk(min(_CANDIDATES, len(flat)), largest=False).indices.sort().values
            squared, absolute = _errors(part[:, None], flat[candidates])
            best = squared.argmin(1, keepdim=True)
            candidate = squared.gather(1, best)[:, 0]
            better = candidate < mse[rows]
            mse[rows] = torch.where(better, candidate, mse[rows])
            mae[rows] = torch.where(better, absolute.gather(1, best)[:, 0], mae[rows])
            index[rows] = torch.where(better, start + candidates.gather(1, best)[:, 0], index[rows])
        start += len(block)
    if n and not start:
        raise DataError("nearest: want at least 1 reference note, got none")
    return Nearest(index, MelErrors(mse, mae))


def _errors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean squared and mean absolute difference over the last dimension, in float64."""
    device = float64_device(a.device)
    difference = a.to(device).double() - b.to(device).double()
    return difference.square().mean(-1), difference.abs().mean(-1)


_BREAK_HZ, _BREAK_MEL = 1000.0, 15.0  # where the mel scale turns from linear to logarithmic
_LOG_STEP = math.log(6.4) / 27


def _mel(hertz: float) -> float:
    if hertz < _BREAK_HZ:
        return hertz * _BREAK_MEL / _BREAK_HZ
    return _BREAK_MEL + math.log(hertz / _BREAK_HZ) / _LOG_STEP


def _hertz(mel: Tensor) -> Tensor:
    linear = mel * (_BREAK_HZ / _BREAK_MEL)
    return torch.where(mel < _BREAK_MEL, linear, _BREAK_HZ * ((mel - _BREAK_MEL) * _LOG_STEP).exp())
