"""The front end: waveform <-> complex STFT <-> normalised log magnitude <-> CMX tensor, and Griffin-Lim back.

The waveform is zero-padded at its end to (frames - 1) * hop samples, so that a note's onset stays in frame 0
and `frames` is exact. Frames are centred, with zeros (not a reflection) before the first sample and after the
last: a note starts from silence, and a reflected attack would be heard before it. Of the n_fft / 2 + 1 bins
one is dropped, DC unless told otherwise, as in GANSynth (Engel et al. 2019, arXiv:1902.08710).

Everything is computed in float32, on the device of its input, over any leading dimensions.
"""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mars import kernels
from mars.config import AudioConfig
from mars.errors import ConfigError
from mars.files import write_atomically
from mars.runtime import thread_pool


def stft(waveform: Tensor, config: AudioConfig) -> Tensor:
    """Compute the short-time Fourier transform with a periodic Hann window.

    waveform: (..., samples), full scale 1; shorter or longer than config.samples is padded with zeros or cut.
    Returns complex64 (..., n_fft / 2 + 1, frames), scaled as `torch.stft` does.
    """
    if waveform.ndim == 0:
        raise ConfigError("audio.stft: want a waveform (..., samples), got a single number")
    waveform = _as_float32("audio.stft", waveform)[..., : config.samples]
    before = config.n_fft // 2
    padded = F.pad(waveform, (before, _padded_length(config) - before - waveform.shape[-1]))
    if not padded.numel():  # MKL refuses an empty batch
        bins = config.n_fft // 2 + 1
        return torch.zeros(*padded.shape[:-1], bins, config.frames, dtype=torch.complex64, device=padded.device)
    frames = padded.unfold(-1, config.n_fft, config.hop) * _window(config, waveform.device)
    return torch.fft.rfft(frames).mT


def istft(spectrum: Tensor, config: AudioConfig) -> Tensor:
    """Return the waveform (..., samples) whose `stft` is nearest in least squares to (..., n_fft / 2 + 1, frames).

    Griffin and Lim 1984, eq. 6; exact for a spectrum that `stft` made.
    """
    _check_shape("audio.istft", spectrum, config.n_fft // 2 + 1, config.frames)
    signal = _synthesise(
        spectrum.to(torch.complex64).mT.reshape(-1, config.frames, config.n_fft // 2 + 1),
        _window(config, spectrum.device),
        _gain(config, spectrum.device),
        config.hop,
    )
    return _note(signal, config).reshape(*spectrum.shape[:-2], config.samples)


def spectrogram(waveform: Tensor, config: AudioConfig) -> Tensor:
    """Compute the normalised log magnitude (..., bins, frames) in [-1, 1], low bins first, of (..., samples).

    x = 2 (20 log10(m + e) - min_db) / (max_db - min_db) - 1 with e = 10^(min_db / 20), clipped at +1. As e is
    added and not a floor, silence is exactly -1 and `magnitudes` recovers every m below max_db, zero
    included: a floor would come back as hiss.
    """
    return kernels.spectrogram_cmx(_kept_bins(waveform, config), (1, 1), *_normalisation(config)).squeeze(-3)


def magnitudes(spectrogram: Tensor, config: AudioConfig) -> Tensor:
    """Undo `spectrogram`: (..., bins, frames), clamped to [-1, 1], to linear (..., n_fft / 2 + 1, frames).

    The bins that were dropped come back as zeros.
    """
    _check_shape("audio.magnitudes", spectrogram, config.bins, config.frames)
    x = _as_float32("audio.magnitudes", spectrogram).unsqueeze(-3)
    return kernels.inverse_spectrogram_cmx(x, (1, 1), *_normalisation(config), _dropped_bins(config))


def multiplexed(waveform: Tensor, config: AudioConfig) -> Tensor:
    """Return the CMX tensor (..., C, F, T), of shape config.shape, of the spectrogram of a waveform (..., samples)."""
    return kernels.spectrogram_cmx(_kept_bins(waveform, config), config.cmx, *_normalisation(config))


def demultiplexed(x: Tensor, config: AudioConfig) -> Tensor:
    """Return the spectrogram (..., bins, frames) held by a CMX tensor (..., C, F, T)."""
    _check_shape("audio.demultiplexed", x, *config.shape)
    return kernels.inverse_cmx(x, config.cmx)


def demultiplexed_magnitudes(x: Tensor, config: AudioConfig) -> Tensor:
    """Return `magnitudes` (..., n_fft / 2 + 1, frames) of the spectrogram held by a CMX tensor (..., C, F, T)."""
    _check_shape("audio.demultiplexed_magnitudes", x, *config.shape)
    x = _as_float32("audio.demultiplexed_magnitudes", x)
    return kernels.inverse_spectrogram_cmx(x, config.cmx, *_normalisation(config), _dropped_bins(config))


def griffin_lim(
    magnitudes: Tensor,
    config: AudioConfig,
    iterations: int = 32,
    momentum: float = 0.99,
    generators: Sequence[torch.Generator] | torch.Generator | int | None = None,
) -> Tensor:
    """Return a waveform (..., samples) whose STFT has about these magnitudes (..., n_fft / 2 + 1, frames).

    Fast Griffin-Lim (Perraudin, Balazs and Sondergaard 2013), momentum as in `librosa.griffinlim`: 0 is the
    algorithm of 1984. Each note starts from uniformly random phases, drawn from

    - its own generator, given one a note in the order of the flattened leading dimensions;
    - a fresh generator with this seed, the same for every note, given an int;
    - one generator (None: torch's default one), note after note.

    With the first two a note sounds the same whatever it is batched with. On a CPU that is bit for bit, for
    any number of threads too: there each note is the work of one thread, and fits its core's cache.
    """
    bins = config.n_fft // 2 + 1
    _check_shape("audio.griffin_lim", magnitudes, bins, config.frames)
    if iterations < 0 or not 0 <= momentum < 1:
        raise ConfigError(f"griffin_lim: want iterations >= 0, 0 <= momentum < 1; got {iterations}, {momentum}")
    notes = _as_float32("audio.griffin_lim", magnitudes).reshape(-1, bins, config.frames)
    if isinstance(generators, Sequence) and len(generators) != len(notes):
        raise ConfigError(f"griffin_lim: want one generator a note, {len(notes)}; got {len(generators)}")
    if not len(notes):
        return notes.new_zeros(*magnitudes.shape[:-2], config.samples)
    phases = torch.stack([_phases(config, generators, note) for note in range(len(notes))]).to(notes.device)
    restored = partial(
        _fast_griffin_lim,
        window=_window(config, notes.device),
        gain=_gain(config, notes.device),
        hop=config.hop,
        iterations=iterations,
        momentum=momentum,
    )
    size = 1 if notes.device.type == "cpu" else 64
    batches = [[x[i : i + size] for i in range(0, len(x), size)] for x in (notes, phases)]
    if notes.device.type == "cpu":
        with thread_pool(torch.get_num_threads()) as pool:
            signals = list(pool.map(restored, *batches))
    else:
        signals = list(map(restored, *batches))
    return _note(torch.cat(signals), config).reshape(*magnitudes.shape[:-2], config.samples)


def within_full_scale(waveforms: Tensor) -> Tensor:
    """Scale those of waveforms (B, samples) that go beyond full scale down until they just reach it.

    Griffin-Lim overshoots at times. A note is made quieter rather than clipped, and never louder.
    """
    return waveforms / waveforms.abs().amax(dim=1, keepdim=True).clamp_min(1)


def write_wav(path: Path | str, waveform: Tensor, sample_rate: int) -> None:
    """Write a waveform (samples,), full scale 1, as mono WAV of `pcm`; the file appears whole or not at all."""
    samples = pcm(waveform)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.astype(np.dtype("<i2")).tobytes())
    write_atomically(Path(path), buffer.getvalue())


def pcm(waveform: Tensor) -> NDArray[np.int16]:
    """Return the 16-bit samples (n,) of a waveform (n,) whose full scale is 1.

    They are rounded to a multiple of 1 / 32768 (ties to even) and clipped to [-1, 1 - 1 / 32768].

    Raises:
        ConfigError: another shape, integers, NaN or infinity.
    """
    if waveform.ndim != 1:
        raise ConfigError(f"pcm: want a waveform (samples,), got shape {tuple(waveform.shape)}")
    samples = _as_float32("pcm", waveform).detach().cpu()
    if not bool(samples.isfinite().all()):
        raise ConfigError("pcm: the waveform holds NaN or infinity")
    return (samples * 32768).round().clamp(-32768, 32767).to(torch.int16).numpy()


@torch.no_grad()  # here and not on griffin_lim, because every thread has its own gradient mode
def _fast_griffin_lim(
    magnitude: Tensor,
    phases: Tensor,
    *,
    window: Tensor,
    gain: Tensor,
    hop: int,
    iterations: int,
    momentum: float,
) -> Tensor:
    """Return the padded signal (notes, length) of magnitude (notes, bins, frames), turns (notes, frames, bins)."""
    magnitude = magnitude.mT.contiguous()  # frames before bins, as the FFTs want them
    spectrum = torch.polar(magnitude, 2 * math.pi * phases)
    target = magnitude.to(torch.complex64)  # a product of one dtype runs faster than of two
    inertia = momentum / (1 + momentum)
    blocks = magnitude.new_empty(len(magnitude), len(gain) // hop, hop)
    previous = torch.zeros_like(spectrum)
    for _ in range(iterations):
        signal = _synthesise(spectrum, window, gain, hop, out=blocks)
        consistent = torch.fft.rfft(signal.unfold(-1, len(window), hop) * window)
        # The direction of consistent - inertia * previous, subtracted as real numbers, which is faster.
        torch.sub(
            torch.view_as_real(consistent),
            torch.view_as_real(previous),
            alpha=inertia,
            out=torch.view_as_real(previous),
        )
        spectrum = torch.sgn(previous, out=previous).mul_(target)  # sgn(0) = 0, so silence makes no NaN
        previous = consistent
    return _synthesise(spectrum, window, gain, hop, out=blocks)


def _synthesise(spectrum: Tensor, window: Tensor, gain: Tensor, hop: int, out: Tensor | None = None) -> Tensor:
    """Return the least-squares padded signal (notes, length) of a spectrum (notes, frames, bins), in `out` if given.

    Overlap-add in slices of hop samples: slice k of all frames lands on one run of whole blocks, so that any
    hop, a divisor of n_fft or not, costs ceil(n_fft / hop) multiply-adds. out: (notes, length / hop, hop).
    """
    frames = torch.fft.irfft(spectrum, len(window))
    notes, count, n_fft = frames.shape
    blocks = frames.new_empty(notes, len(gain) // hop, hop) if out is None else out
    blocks.zero_()
    for k, start in enumerate(range(0, n_fft, hop)):
        piece = slice(start, start + hop)
        width = len(window[piece])
        blocks[:, k : k + count, :width].addcmul_(frames[..., piece], window[piece])
    return blocks.view(notes, -1).mul_(gain)


def _gain(config: AudioConfig, device: torch.device) -> Tensor:
    """Return the factor on overlap-add, (padded length,): 1 / the summed squared windows, and 0 outside the note.

    The zeros are what is known of the signal there; Griffin-Lim imposes them in every iteration.
    """
    squares = _window(config, torch.device("cpu")).square()
    total = torch.zeros(_padded_length(config), dtype=torch.float32, device="cpu")
    for frame in range(config.frames):
        total[frame * config.hop :][: config.n_fft] += squares
    gain = torch.zeros_like(total)
    _note(gain, config).copy_(_note(total, config).reciprocal())
    return gain.to(device)


def _note(signal: Tensor, config: AudioConfig) -> Tensor:
    """Return the note's own samples (..., samples), a view of the padded signal (..., padded length)."""
    start = config.n_fft // 2
    return signal[..., start : start + config.samples]


def _padded_length(config: AudioConfig) -> int:
    """Return the samples under all frames, a whole number of hops: `unfold` then finds exactly config.frames frames."""
    return (config.frames - 1 + math.ceil(config.n_fft / config.hop)) * config.hop


def _window(config: AudioConfig, device: torch.device) -> Tensor:
    return torch.hann_window(config.n_fft, periodic=True, dtype=torch.float32, device=device)


def _phases(
    config: AudioConfig, generators: Sequence[torch.Generator] | torch.Generator | int | None, note: int
) -> Tensor:
    """Draw a note's phases (frames, n_fft / 2 + 1), as fractions of a turn, on the device of its generator."""
    generator: torch.Generator | None
    if isinstance(generators, int):
        generator = torch.Generator().manual_seed(generators)
    elif isinstance(generators, Sequence):
        generator = generators[note]
    else:
        generator = generators
    device = None if generator is None else generator.device
    return torch.rand(config.frames, config.n_fft // 2 + 1, generator=generator, dtype=torch.float32, device=device)


def _dropped_bins(config: AudioConfig) -> tuple[int, int]:
    """Return how many of the n_fft / 2 + 1 bins are left out below and above those kept."""
    below = 1 if config.drop == "dc" else 0
    return below, config.n_fft // 2 + 1 - below - config.bins


def _kept_bins(waveform: Tensor, config: AudioConfig) -> Tensor:
    """Return `stft` without the bins that are left out: complex64 (..., bins, frames)."""
    below, _ = _dropped_bins(config)
    return stft(waveform, config)[..., below : below + config.bins, :]


def _normalisation(config: AudioConfig) -> tuple[float, float]:
    """Return (e, scale) such that x = scale * log(m / e + 1) - 1."""
    epsilon = 10 ** (config.min_db / 20)
    return epsilon, 40 / (math.log(10) * (config.max_db - config.min_db))


def _as_float32(name: str, x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise ConfigError(f"{name}: want a floating-point tensor (audio with full scale 1), got {x.dtype}")
    return x.float()


def _check_shape(name: str, x: Tensor, *shape: int) -> None:
    if x.shape[-len(shape) :] != shape:
        raise ConfigError(f"{name}: want (..., {', '.join(map(str, shape))}), got {tuple(x.shape)}")
