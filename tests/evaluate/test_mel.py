"""Log-mel spectrograms against librosa, errors against scikit-learn, neighbours against brute force."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import sklearn.metrics
import torch

from mars.errors import DataError
from mars.evaluate.mel import filterbank, log_mel, mel_errors, nearest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # whatever a librosa import says is not about us
    import librosa


def waveforms() -> torch.Tensor:
    t = torch.arange(64_000) / 16_000
    note = sum(torch.sin(2 * math.pi * 220 * k * t) / k for k in range(1, 30)) * 0.4 * torch.exp(-t)
    return torch.stack([0.9 * torch.sin(2 * math.pi * 440 * t), 2 * torch.randn(64_000), note])


def test_filters_are_librosas():
    for arguments in ((16_000, 1024, 80, 20.0, 8000.0), (22_050, 2048, 128, 0.0, 11_025.0)):
        rate, n_fft, bands, low, high = arguments
        expected = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=bands, fmin=low, fmax=high, dtype=np.float64)
        np.testing.assert_allclose(filterbank(*arguments).numpy(), expected, atol=1e-12)


def test_log_mel_is_librosas():
    given = waveforms()
    actual = log_mel(given)
    assert actual.shape == (3, 80, 251)
    assert actual.dtype == torch.float32
    for waveform, spectrogram in zip(given, actual, strict=True):
        magnitudes = librosa.feature.melspectrogram(
            y=np.clip(waveform.numpy(), -1, 1), sr=16_000, n_fft=1024, hop_length=256, n_mels=80, fmin=20, fmax=8000,
            power=1.0,
        )  # fmt: skip
        expected = np.clip((20 * np.log10(np.maximum(magnitudes, 1e-5)) - 20 + 100) / 100, 0, 1)
        np.testing.assert_allclose(spectrogram.numpy(), expected, atol=1e-5)


def test_no_notes_make_no_spectrograms():
    assert log_mel(torch.zeros(0, 64_000)).shape == (0, 80, 251)


def test_waveforms_are_left_as_they_are():
    given = 2 * torch.randn(2, 3000, dtype=torch.float64)
    before = given.clone()
    log_mel(given)
    assert torch.equal(given, before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_waveforms_that_are_not_finite_are_an_error(value):
    given = torch.zeros(3, 3000)
    given[1, 7] = value
    with pytest.raises(DataError, match=r"^log_mel: 1 of 3 notes hold NaN or infinity"):
        log_mel(given)


def test_range():
    assert not bool(log_mel(torch.zeros(2, 64_000)).any())
    loudest = log_mel(torch.ones(1, 64_000).where(torch.arange(64_000) % 40 < 20, -1.0))
    assert 0 < float(loudest.max()) <= 1
    assert float(loudest.min()) >= 0
    with pytest.raises(
        ValueError, match=r"^log_mel: want floating-point \(B, samples\), got torch.float32 \(64000,\)$"
    ):
        log_mel(torch.zeros(64_000))


def test_batches_do_not_show():
    given = torch.randn(70, 3000) * 0.1
    torch.testing.assert_close(log_mel(given)[67:68], log_mel(given[67:68]), rtol=0, atol=1e-7)


def test_errors_are_scikit_learns():
    real, fake = torch.rand(2, 70, 5, 9)
    found = mel_errors(real, fake)
    for i in (0, 69):
        pair = real[i].double().numpy(), fake[i].double().numpy()
        assert float(found.mse[i]) == pytest.approx(sklearn.metrics.mean_squared_error(*pair), rel=1e-12)
        assert float(found.mae[i]) == pytest.approx(sklearn.metrics.mean_absolute_error(*pair), rel=1e-12)
    assert float(found.mse.mean()) == pytest.approx(float((real - fake).double().square().mean()))
    with pytest.raises(ValueError, match=r"want \(n, bands, frames\) twice, got \(70, 5, 9\), \(69, 5, 9\)"):
        mel_errors(real, fake[1:])


def test_noise_makes_errors_that_grow_with_it():
    clean = waveforms()[2:]
    noise = torch.randn(1, 64_000)
    real = log_mel(clean)
    quiet, loud = (mel_errors(real, log_mel(clean + level * noise)) for level in (0.001, 0.01))
    assert 0 < float(quiet.mse) < float(loud.mse)
    assert 0 < float(quiet.mae) < float(loud.mae)


def brute_force(queries: torch.Tensor, references: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    difference = queries.double()[:, None] - references.double()
    mse, index = difference.square().mean((2, 3)).min(1)
    return index, mse, difference.abs().mean((2, 3)).gather(1, index[:, None])[:, 0]


@pytest.mark.parametrize("blocks", [1, 3])
def test_nearest_is_brute_force(blocks):
    references, queries = torch.rand(90, 8, 25), torch.rand(130, 8, 25)
    index, mse, mae = brute_force(queries, references)
    found = nearest(queries, references if blocks == 1 else iter(references.split(40)))
    assert torch.equal(found.index, index)
    torch.testing.assert_close(found.errors.mse, mse, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.errors.mae, mae, rtol=1e-12, atol=0)
    assert found.distinct == len(set(index.tolist()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_nearest_in_any_precision(dtype):
    references, queries = torch.rand(300, 80, 100).to(dtype), torch.rand(40, 80, 100).to(dtype)
    index, mse, _ = brute_force(queries, references)
    for block in (references, references.float()):
        found = nearest(queries, block)
        assert torch.equal(found.index, index)
        torch.testing.assert_close(found.errors.mse, mse, rtol=1e-6, atol=0)


def test_nearest_is_as_exact_where_products_are_set_to_be_rough():
    queries = torch.rand(10, 80, 100)
    away = (
        torch.nn.functional.normalize(torch.randn(10, 60, 8000), dim=2) * torch.linspace(0.1, 0.7, 60)[:, None].sqrt()
    )
    references = (queries[:, None] + away.unflatten(2, (80, 100))).flatten(0, 1)
    torch.set_float32_matmul_precision("medium")  # training sets it: bfloat16 products on some CPUs
    try:
        found = nearest(queries, references)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found.index.tolist() == list(range(0, 600, 60))


def test_planted_neighbours_that_a_product_cannot_tell_apart():
    references = torch.rand(50, 80, 251)
    near = references[:10].clone()
    near[:, 0, 0] += 1e-3  # 5e-11 of mean squared error; squares of 7,000 in float32 are known to 5e-4
    references = torch.cat([references, near])
    queries = torch.cat([references[:10], near, references[20:21] + 0.001])
    found = nearest(queries, references)
    assert found.index.tolist() == [*range(10), *range(50, 60), 20]
    assert not bool(found.errors.mse[:20].any())
    assert float(found.errors.mse[20]) == pytest.approx(1e-6, rel=1e-3)


def test_both_errors_are_of_one_neighbour():
    references = torch.zeros(2, 1, 4)
    references[0] = 1.0  # MSE 1, MAE 1
    references[1, 0, 0] = 3.0  # MSE 2.25, MAE 0.75
    found = nearest(torch.zeros(1, 1, 4), references)
    assert (int(found.index), float(found.errors.mse), float(found.errors.mae)) == (0, 1, 1)


def test_collapsed_modes_show_in_the_distinct_neighbours():
    references = torch.rand(40, 4, 6)
    assert nearest(references, references).distinct == 40
    assert nearest(references[:2].repeat(20, 1, 1) + 0.001, references).distinct == 2


def test_nearest_refuses():
    with pytest.raises(DataError, match="want at least 1 reference note, got none"):
        nearest(torch.rand(2, 3, 4), iter([]))
    with pytest.raises(ValueError, match=r"want references \('m', 3, 4\), got \(5, 3, 5\)"):
        nearest(torch.rand(2, 3, 4), torch.rand(5, 3, 5))
    bad = torch.rand(5, 3, 4)
    bad[2, 0, 0] = torch.nan
    with pytest.raises(DataError, match=r"^nearest \(queries\): 1 of 5 notes hold NaN"):
        nearest(bad, torch.rand(2, 3, 4))
    with pytest.raises(DataError, match=r"^nearest \(references\): 1 of 5 notes hold NaN"):
        nearest(torch.rand(2, 3, 4), bad)
