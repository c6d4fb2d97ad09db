"""What a classifier sees: log magnitudes of a note's short-time Fourier transform, on linear bins or mel bands.

`PUBLISHED` is what the networks of Nistal, Lattner and Richard (2020, arXiv:2006.09266) are given by their evaluation
code: a second of the note, no mel bands, stretched to a square. `WHOLE_NOTE` is the note on 128 mel bands and 256
frames; they are 128 ms long because in 64 ms notes below MIDI 45 are often taken for their neighbours.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mars.errors import ConfigError
from mars.evaluate import mel
from mars.runtime import float64_device

SAMPLE_RATE = 16_000  # Hz
LONGEST, LARGEST = 1 << 20, 1 << 12  # samples; pixels of a side. Settings of strangers cannot take more


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontEnd:
    """Waveforms (B, samples) at 16 kHz to pictures (B, 1, height, width), low frequencies first."""

    samples: int  # read from the note's start; a shorter note is padded with zeros
    fade: float = 0.0  # share of them, at their end, that is faded out
    n_fft: int
    window: int  # samples of the periodic Hann window
    hop: int
    padding: Literal["constant", "reflect"]  # of the first and last frame
    mels: int  # Slaney bands from 20 Hz to 8 kHz; 0: the linear bins without DC
    scale: Literal["ln", "db"]  # ln(x + 1e-10); or 20 log10(x) - 20, with -100..0 dB mapped to 0..1 and clipped
    square: int = 0  # stretched to this height and width by repeating the nearest; 0: left as it is

    def __post_init__(self) -> None:
        if not (
            0 < self.n_fft // 2 < self.samples <= LONGEST
            and 0 < self.window <= self.n_fft
            and 0 < self.hop <= self.n_fft
            and 0 <= self.mels <= self.n_fft // 2
            and 0 <= self.fade <= 1
            and 0 <= self.square <= LARGEST
        ):
            raise ConfigError(
                f"want n_fft / 2 < samples <= {LONGEST:,}, window, hop and mels within n_fft, fade in 0..1 and square "
                f"at most {LARGEST:,}; got {self}"
            )

    @property
    def picture(self) -> tuple[int, int]:
        """Height and width of what it makes."""
        if self.square:
            return self.square, self.square
        return self.mels or self.n_fft // 2, 1 + self.samples // self.hop

    @property
    def hash(self) -> str:
        """Hex sum of the settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def __call__(self, waveforms: Tensor) -> Tensor:
        """Return float32 (B, 1, height, width) of waveforms (B, any number of samples), on their device."""
        x = waveforms.float()[:, : self.samples]
        if self.scale == "ln":  # whose floor is far below float32's rounding: a tone's quiet bins would be noise
            x = x.to(float64_device(x.device)).double()
        x = F.pad(x, (0, self.samples - x.shape[1]))
        if self.fade:
            x = x * _fade_out(self.samples, self.fade).to(x)
        window = torch.hann_window(self.window, dtype=x.dtype, device=x.device)
        spectrum = torch.stft(
            x, self.n_fft, self.hop, self.window, window, center=True, pad_mode=self.padding, return_complex=True
        )
        bins = spectrum.abs().unsqueeze(1)
        bands = mel.filterbank(SAMPLE_RATE, self.n_fft, self.mels).to(x) @ bins if self.mels else bins[:, :, 1:]
        picture = torch.log(bands + 1e-10) if self.scale == "ln" else _decibels(bands)
        if self.square:
            picture = F.interpolate(picture, (self.square, self.square), mode="nearest")
        return picture.to(waveforms.device, torch.float32)


def _decibels(magnitudes: Tensor) -> Tensor:
    """Return 20 log10(x) - 20, of which -100..0 dB are mapped to 0..1."""
    return (20 * magnitudes.clamp(min=1e-10).log10() + 80).div(100).clamp(0, 1)


def _fade_out(samples: int, share: float) -> Tensor:
    """(samples,): ones, then a power of ten that falls from 1 to 0 over the last `share`."""
    curve = torch.logspace(1, 0, int(samples * share), dtype=torch.float64)
    curve = (curve - curve.min()) / (curve.max() - curve.min())
    return torch.cat((torch.ones(samples - len(curve), dtype=torch.float64), curve))


PUBLISHED = FrontEnd(
    samples=64 * 256 - 1, fade=0.3, n_fft=2048, window=1024, hop=256, padding="reflect", mels=0, scale="ln", square=299
)
WHOLE_NOTE = FrontEnd(samples=255 * 256, n_fft=2048, window=2048, hop=256, padding="constant", mels=128, scale="db")
