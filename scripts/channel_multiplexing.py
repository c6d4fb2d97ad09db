"""Reconstruction with and without channel multiplexing (MARS §3.4), after equal steps from the same seeds.

python -m scripts.channel_multiplexing [--steps N] [--seeds 0,1] [--data PACKED] [--set KEY=VALUE …]

Trains the tokenizers of the presets `truncated` (256 x 256 x 1) and `cmx` (128 x 128 x 4), made small and, by default,
without the discriminator, and prints their errors on held-out instruments: of the spectrograms in [-1, 1], and of the
mel spectrograms after Griffin-Lim, as mars.evaluate.mel computes them, both against the low 256 bins of 2 s.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mars import audio
from mars.config import Config, preset
from mars.data import Dataset, open_dataset
from mars.data.splits import spread
from mars.evaluate import mel
from mars.model import Model
from mars.runtime import stream
from mars.train.loop import batch_indices
from mars.train.tokenizer import TokenizerStage

SMALL = (
    *("tokenizer.width=256", "tokenizer.depth=2", "tokenizer.heads=4", "tokenizer.codebook_size=1024"),
    *("tokenizer.layer_scale=0", "tokenizer.drop_path=0", "train.optimizer=muon", "train.lr=2e-3"),
    *("train.weight_decay=0", "train.batch_size=8", "train.adversarial=false", "train.validate_notes=64"),
)


def train(config: Config, dataset: Dataset, seed: int) -> TokenizerStage:
    """A tokenizer, trained to the end."""
    stage = TokenizerStage(config, dataset, torch.device("cpu"), seed)
    notes = dataset.split("train")
    for step in range(stage.train.steps):
        x = stage.batch(batch_indices(seed, step, stage.train.notes_per_step, notes))
        stage.step(step, [x], [stream(seed, 1, step, 0)])
    return stage


def mel_errors(stage: TokenizerStage) -> tuple[float, float]:
    """Mel MSE and MAE of held-out notes against what Griffin-Lim makes of their own low bins."""
    settings = stage.config.audio
    model = Model(config=stage.config, tokenizer=stage.ema)
    waveforms = stage.dataset.waveforms(spread(stage.dataset.split("valid"), stage.train.validate_notes))[
        :, : settings.samples
    ]
    true = audio.magnitudes(audio.spectrogram(waveforms, settings), settings)
    streams = [torch.Generator().manual_seed(0) for _ in waveforms]
    oracle = audio.griffin_lim(true, settings, generators=streams)
    errors = mel.mel_errors(mel.log_mel(oracle), mel.log_mel(model.decode(model.encode(waveforms))))
    return float(errors.mse.mean()), float(errors.mae.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", default="0,1", help="comma-separated")
    parser.add_argument("--data", type=Path, default=None, help="packed dataset; default: the built-in notes")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    dataset = open_dataset(options.data)
    if not len(dataset.split("valid")):
        parser.error(f"{options.data} holds no notes out; pack it again with --hold-out")
    print("| seed | input | MSE | MAE | mel MSE | mel MAE |\n|---|---|---|---|---|---|")
    for seed in map(int, options.seeds.split(",")):
        rows = []
        for name in ("truncated", "cmx"):
            settings = (*SMALL, f"train.steps={options.steps}", *options.overrides)
            stage = train(preset(name, settings, "tokenizer"), dataset, seed)
            result = stage.validate()
            rows.append((result["val_mse"], result["val_mae"], *mel_errors(stage)))
            print(f"| {seed} | {name} | {' | '.join(f'{x:.4f}' for x in rows[-1])} |", flush=True)
        difference = (b - a for a, b in zip(*rows, strict=True))
        print(f"| {seed} | difference | {' | '.join(f'{x:+.4f}' for x in difference)} |", flush=True)


if __name__ == "__main__":
    main()
