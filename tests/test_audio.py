"""The front end against torch.stft, torch.istft and librosa, and its own inverses."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mars import audio
from mars.config import AudioConfig

NSYNTH = AudioConfig()
SMALL = AudioConfig(sample_rate=8000, samples=4000, n_fft=256, hop=64, bins=128, frames=64)
CONFIGS = [
    NSYNTH,
    AudioConfig(samples=128_000, frames=512),
    SMALL,
    dataclasses.replace(SMALL, hop=60, frames=70),
    dataclasses.replace(SMALL, n_fft=250, hop=125, bins=125, frames=33),  # n_fft not a power of two, least overlap
    dataclasses.replace(SMALL, n_fft=254, hop=100, bins=64, frames=41, drop="nyquist"),
]
REAL_NOTES = Path(__file__).resolve().parents[2] / "shared/data/nsynth-sample/audio"


def note(config: AudioConfig, seed: int = 0, harmonics: int = 8) -> torch.Tensor:
    """A decaying harmonic tone with random phases and a little noise: (samples,)."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(config.samples) / config.sample_rate
    wave = 0.001 * torch.randn(config.samples, generator=generator)
    for k in range(1, harmonics + 1):
        phase = 2 * math.pi * torch.rand(1, generator=generator)
        wave += 0.3 / k * torch.exp(-k * t) * torch.sin(2 * math.pi * 220 * (1 + 0.26 * seed) * k * t + phase)
    return wave


def spectral_convergence(waveform: torch.Tensor, magnitude: torch.Tensor, config: AudioConfig) -> float:
    """20 log10 of the relative error of the waveform's magnitudes, dB; smaller is better."""
    error = (audio.stft(waveform, config).abs() - magnitude).norm() / magnitude.norm()
    return 20 * math.log10(error)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.n_fft}-{c.hop}-{c.samples}")
def test_stft_is_torch_stft_of_the_padded_waveform(config):
    wave = torch.randn(2, config.samples)
    padded = torch.nn.functional.pad(wave, (0, (config.frames - 1) * config.hop - config.samples))
    expected = torch.stft(
        padded,
        config.n_fft,
        config.hop,
        window=torch.hann_window(config.n_fft),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    got = audio.stft(wave, config)
    assert got.shape == (2, config.n_fft // 2 + 1, config.frames)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    assert audio.spectrogram(wave, config).shape == (2, config.bins, config.frames)
    torch.testing.assert_close(audio.istft(got, config), wave, rtol=0, atol=2e-6)


def test_the_papers_sizes():
    assert audio.spectrogram(torch.zeros(64_000), AudioConfig()).shape == (512, 256)
    assert audio.spectrogram(torch.zeros(128_000), AudioConfig(samples=128_000, frames=512)).shape == (
        512,
        512,
    )
    assert audio.multiplexed(torch.zeros(64_000), AudioConfig(cmx=(2, 1))).shape == (2, 256, 256)


def test_short_audio_is_padded_and_long_audio_cut():
    wave = note(SMALL)
    short = torch.cat([wave[:3000], torch.zeros(1000)])
    assert torch.equal(audio.stft(wave[:3000], SMALL), audio.stft(short, SMALL))
    assert torch.equal(audio.stft(torch.cat([wave, wave]), SMALL), audio.stft(wave, SMALL))
    assert torch.equal(audio.stft(wave[:0], SMALL), torch.zeros(129, 64, dtype=torch.complex64))


def test_leading_dimensions():
    wave = torch.stack([note(SMALL, seed) for seed in range(6)]).reshape(2, 3, -1)
    alone = audio.spectrogram(wave[1, 2], SMALL)
    torch.testing.assert_close(audio.spectrogram(wave, SMALL)[1, 2], alone, rtol=0, atol=1e-5)  # other FFTs at once
    assert audio.spectrogram(wave[:0], SMALL).shape == (0, 3, 128, 64)


@pytest.mark.parametrize("drop", ["dc", "nyquist"])
def test_normalisation_is_the_documented_one_and_inverts(drop):
    config = dataclasses.replace(SMALL, drop=drop)
    wave = note(config) + 0.1
    exact = audio.stft(wave, config).abs()
    x = audio.spectrogram(wave, config)
    kept = exact[1:] if drop == "dc" else exact[:-1]
    decibels = 20 * torch.log10(kept.double() + 10 ** (config.min_db / 20))
    expected = 2 * (decibels - config.min_db) / (config.max_db - config.min_db) - 1
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-6)

    back = audio.magnitudes(x, config)
    dropped = 0 if drop == "dc" else -1
    assert back.shape == exact.shape
    assert torch.equal(back[dropped], torch.zeros(config.frames))
    torch.testing.assert_close(back[1:] if drop == "dc" else back[:-1], kept, rtol=2e-5, atol=1e-8)


def test_fewer_bins_keep_the_low_end():
    config = dataclasses.replace(SMALL, bins=40)
    x = audio.spectrogram(note(config), config)
    assert torch.equal(x, audio.spectrogram(note(config), SMALL)[:40])
    assert torch.equal(audio.magnitudes(x, config)[41:], torch.zeros(88, 64))


def test_silence_is_exactly_minus_one_and_comes_back_as_silence():
    x = audio.spectrogram(torch.zeros(2, SMALL.samples), SMALL)
    assert torch.equal(x, torch.full((2, 128, 64), -1.0))
    m = audio.magnitudes(x, SMALL)
    assert torch.equal(m, torch.zeros(2, 129, 64))
    assert torch.equal(audio.griffin_lim(m, SMALL, iterations=3), torch.zeros(2, SMALL.samples))


def test_levels_are_clipped_to_the_range():
    assert audio.spectrogram(1e4 * note(SMALL), SMALL).max() == 1
    x = torch.tensor([-3.0, -1.0, 1.0, 3.0]).repeat(32).reshape(128, 1).expand(128, 64)
    m = audio.magnitudes(x, SMALL)
    assert torch.equal(m, audio.magnitudes(x.clamp(-1, 1), SMALL))
    assert 20 * math.log10(m.max() + 10 ** (SMALL.min_db / 20)) == pytest.approx(SMALL.max_db, abs=1e-4)


@pytest.mark.parametrize("cmx", [(1, 1), (2, 1), (1, 2), (4, 2)], ids=str)
def test_multiplexing_inverts_exactly(cmx):
    config = dataclasses.replace(SMALL, cmx=cmx)
    wave = torch.stack([note(config), note(config, 1)])
    x = audio.multiplexed(wave, config)
    assert x.shape == (2, *config.shape)
    assert torch.equal(audio.demultiplexed(x, config), audio.spectrogram(wave, config))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_floats_are_computed_in_float32(dtype):
    wave = note(SMALL).to(dtype)
    x = audio.spectrogram(wave, SMALL)
    assert x.dtype == torch.float32
    assert torch.equal(x, audio.spectrogram(wave.float(), SMALL))
    m = audio.magnitudes(x.to(dtype), SMALL)
    assert m.dtype == torch.float32
    assert audio.griffin_lim(m.to(dtype), SMALL, iterations=1).dtype == torch.float32


def test_spectrogram_has_finite_gradients_on_sound():
    wave = note(SMALL).requires_grad_()
    audio.spectrogram(wave, SMALL).sum().backward()
    assert wave.grad is not None
    assert wave.grad.isfinite().all()


@pytest.mark.parametrize("config", CONFIGS[2:], ids=lambda c: f"{c.n_fft}-{c.hop}")
@pytest.mark.parametrize("momentum", [0.0, 0.99])
def test_griffin_lim_is_the_textbook_iteration(config, momentum):
    """The published algorithm on torch.stft and torch.istft, from the same phases."""
    magnitude = audio.stft(note(config), config).abs()
    turns = torch.rand(config.frames, config.n_fft // 2 + 1, generator=torch.Generator().manual_seed(7)).mT
    direction = torch.polar(torch.ones_like(turns), 2 * math.pi * turns)
    window, length = torch.hann_window(config.n_fft), (config.frames - 1) * config.hop
    last = torch.zeros_like(direction)

    def project(spectrum: torch.Tensor) -> torch.Tensor:
        wave = torch.istft(spectrum, config.n_fft, config.hop, window=window, length=length)
        return torch.nn.functional.pad(wave[: config.samples], (0, length - config.samples))

    for _ in range(3):
        wave = project(magnitude * direction)
        new = torch.stft(wave, config.n_fft, config.hop, window=window, pad_mode="constant", return_complex=True)
        direction = torch.sgn(new - momentum / (1 + momentum) * last)
        last = new
    expected = project(magnitude * direction)[: config.samples]
    got = audio.griffin_lim(magnitude, config, iterations=3, momentum=momentum, generators=7)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def assert_as_good_as_librosa(wave: torch.Tensor, config: AudioConfig, seeds: int) -> None:
    """Over a few random starts; one alone varies by a dB or two in either."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever a librosa import says is not about us
        librosa = pytest.importorskip("librosa")
    magnitude = audio.magnitudes(audio.spectrogram(wave, config), config)
    ours, theirs = [], []
    for seed in range(seeds):
        got = audio.griffin_lim(magnitude, config, iterations=32, generators=seed)
        ours.append(spectral_convergence(got, magnitude, config))
        reference = librosa.griffinlim(
            magnitude.numpy(),
            n_iter=32,
            hop_length=config.hop,
            momentum=0.99,
            random_state=seed,
            length=(config.frames - 1) * config.hop,
        )
        theirs.append(spectral_convergence(torch.from_numpy(reference), magnitude, config))
    assert np.mean(ours) <= np.mean(theirs) + 1.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_griffin_lim_converges_like_librosa(seed):
    config = dataclasses.replace(SMALL, samples=8000, frames=128)
    assert_as_good_as_librosa(note(config, seed), config, seeds=6)


@pytest.mark.skipif(not REAL_NOTES.is_dir(), reason="no NSynth notes beside the repository")
def test_griffin_lim_converges_like_librosa_on_real_notes():
    name = "keyboard_electronic_098-060-100.wav"
    wave, rate = soundfile.read(REAL_NOTES / name, dtype="float32")
    assert rate == NSYNTH.sample_rate
    assert_as_good_as_librosa(torch.from_numpy(wave), NSYNTH, seeds=3)


def test_a_note_does_not_depend_on_its_batch_or_on_the_threads():
    config = dataclasses.replace(SMALL, hop=60, frames=71)  # odd sizes: vector loops have tails
    m = audio.magnitudes(audio.spectrogram(torch.stack([note(config, s) for s in range(5)]), config), config)

    def generators(indices: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(100 + i) for i in indices]

    threads = torch.get_num_threads()
    together = audio.griffin_lim(m, config, iterations=5, generators=generators([0, 1, 2, 3, 4]))
    assert torch.get_num_threads() == threads
    try:
        torch.set_num_threads(1)
        for i in range(5):
            assert torch.equal(audio.griffin_lim(m[i], config, 5, generators=generators([i])), together[i])
    finally:
        torch.set_num_threads(threads)
    shuffled = [3, 0, 4]
    again = audio.griffin_lim(m[shuffled], config, 5, generators=generators(shuffled))
    assert torch.equal(again, together[shuffled])
    nested = audio.griffin_lim(m[:4].unflatten(0, (2, 2)), config, 5, generators=generators([0, 1, 2, 3]))
    assert torch.equal(nested.flatten(0, 1), together[:4])


def test_griffin_lim_seeds():
    m = audio.stft(note(SMALL), SMALL).abs()
    pair = torch.stack([m, m])
    same = audio.griffin_lim(pair, SMALL, 2, generators=3)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], audio.griffin_lim(m, SMALL, 2, generators=4))
    one = audio.griffin_lim(pair, SMALL, 2, generators=torch.Generator().manual_seed(3))
    assert torch.equal(one[0], same[0])
    assert not torch.equal(one[1], one[0])
    torch.manual_seed(3)
    assert torch.equal(audio.griffin_lim(pair, SMALL, 2), one)
    assert audio.griffin_lim(pair[:0], SMALL).shape == (0, SMALL.samples)
    with torch.inference_mode():
        assert torch.equal(audio.griffin_lim(m, SMALL, 2, generators=3), same[0])


def test_write_wav_rounds_clips_and_leaves_nothing_else(tmp_path):
    wave = torch.tensor([0.0, 1.0, -1.0, 7.0, -7.0, 0.4 / 32768, 0.6 / 32768, -0.6 / 32768])
    path = tmp_path / "note.wav"
    audio.write_wav(path, wave, 16_000)
    pcm, rate = soundfile.read(path, dtype="int16")
    assert rate == 16_000
    assert soundfile.info(path).subtype == "PCM_16"
    assert pcm.tolist() == [0, 32767, -32768, 32767, -32768, 0, 1, -1]
    assert list(tmp_path.iterdir()) == [path]
    read, _ = soundfile.read(path, dtype="float32")
    audio.write_wav(path, torch.from_numpy(read), 16_000)
    assert soundfile.read(path, dtype="int16")[0].tolist() == pcm.tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: audio.stft(torch.zeros(4, dtype=torch.int16), SMALL), "want a floating-point tensor.*int16"),
        (lambda: audio.istft(torch.zeros(128, 64), SMALL), r"want \(..., 129, 64\), got \(128, 64\)"),
        (
            lambda: audio.magnitudes(torch.zeros(3, 64, 128), SMALL),
            r"want \(..., 128, 64\), got \(3, 64, 128\)",
        ),
        (
            lambda: audio.demultiplexed(torch.zeros(128, 64), SMALL),
            r"want \(..., 1, 128, 64\), got \(128, 64\)",
        ),
        (lambda: audio.griffin_lim(torch.zeros(128, 64), SMALL), r"want \(..., 129, 64\)"),
        (lambda: audio.griffin_lim(torch.zeros(129, 64), SMALL, momentum=1.0), "0 <= momentum < 1"),
        (
            lambda: audio.griffin_lim(torch.zeros(2, 129, 64), SMALL, generators=[]),
            "one generator a note, 2; got 0",
        ),
        (lambda: audio.write_wav("x.wav", torch.zeros(1, 9), 8000), r"want a waveform \(samples,\)"),
        (lambda: audio.write_wav("x.wav", torch.tensor([math.nan]), 8000), "NaN or infinity"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
