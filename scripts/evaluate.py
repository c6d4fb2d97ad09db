"""Figures of a model: mel MSE/MAE of reconstruction, codebook use and VAR loss per scale.

python scripts/evaluate.py [--model M] [--data PACKED] [--folder DIR_OF_WAVS] [--limit N]

Mel errors: 80 Slaney bands of 20-8000 Hz from librosa (1024/256), 20 log10 - 20 dB, 100 dB mapped to [0, 1]
(Vinay & Lerch 2022), averaged over notes, after Griffin-Lim. The oracle row is Griffin-Lim on the true magnitudes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import librosa
import numpy as np
import soundfile
import torch

import mars
from mars import audio
from mars.data import open_dataset
from mars.runtime import autocast
from mars.train.tokenizer import codebook_use, held_out
from mars.train.var import Objective, VARStage


def mel(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Normalised log-mel (80, frames) of a waveform."""
    spectrum = librosa.feature.melspectrogram(
        y=np.clip(waveform, -1, 1), sr=rate, n_fft=1024, hop_length=256, n_mels=80, fmin=20, fmax=8000, power=1.0
    )
    return np.clip((20 * np.log10(np.maximum(spectrum, 1e-5)) - 20 + 100) / 100, 0, 1)


def errors(real: torch.Tensor, fake: torch.Tensor, rate: int) -> tuple[float, float]:
    """Mean squared and absolute mel error over the notes (B, samples)."""
    pairs = [mel(a.numpy(), rate) - mel(b.numpy(), rate) for a, b in zip(real, fake, strict=True)]
    return float(np.mean([np.square(d).mean() for d in pairs])), float(np.mean([np.abs(d).mean() for d in pairs]))


def report(name: str, model: mars.Model, waveforms: torch.Tensor) -> None:
    """Print the reconstruction errors of the model and of the Griffin-Lim oracle."""
    settings, rate = model.config.audio, model.config.audio.sample_rate
    rebuilt, oracle = [], []
    for part in waveforms.split(16):
        streams = [torch.Generator().manual_seed(0) for _ in part]
        with autocast(model.device, "auto"):
            ids = model.encode(part)
        rebuilt.append(model.decode(ids))
        true = audio.magnitudes(audio.spectrogram(part, settings), settings)
        oracle.append(audio.griffin_lim(true, settings, generators=streams))
    for row, fake in (("model", rebuilt), ("Griffin-Lim oracle", oracle)):
        mse, mae = errors(waveforms, torch.cat(fake), rate)
        print(f"{name} ({len(waveforms)} notes), {row}: mel MSE {mse:.4f}, mel MAE {mae:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--data", type=Path, default=None, help="packed dataset; default: the built-in notes")
    parser.add_argument("--folder", type=Path, default=None, help="WAV files to reconstruct as well")
    parser.add_argument("--limit", type=int, default=256, help="held-out notes")
    options = parser.parse_args()
    model = mars.load(options.model)
    dataset = open_dataset(options.data)
    notes = held_out(dataset, options.limit)
    report("held-out instruments", model, dataset.waveforms(notes)[:, : model.config.audio.samples])
    if options.folder:
        files = sorted(options.folder.glob("*.wav"))
        read = [torch.from_numpy(soundfile.read(f, dtype="float32")[0]) for f in files]
        report(str(options.folder.name), model, torch.stack(read))
    ids = []
    for part in np.array_split(notes, -(-len(notes) // 16)):
        with autocast(model.device, "auto"):
            ids.append(model.encode(dataset.waveforms(part)))
    used, perplexity = codebook_use(
        torch.cat(ids), model.tokenizer.quantizer.starts, model.config.tokenizer.codebook_size
    )
    print(f"codes used per scale on {len(notes)} held-out notes: {used}; perplexity {perplexity}")
    if model.var is not None:
        tokens = torch.zeros(len(dataset), model.config.tokenizer.tokens, dtype=torch.int32)
        tokens[notes] = torch.cat(ids).int()
        stage = VARStage(model.config, dataset, model.tokenizer, tokens, model.device, seed=0)
        stage.judge = Objective(model.var)
        print(stage.validate())


if __name__ == "__main__":
    main()
