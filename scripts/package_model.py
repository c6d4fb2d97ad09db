"""Pack a finished VAR run as a model for the wheel: float16 weights and a model card from the runs' own logs.

python scripts/package_model.py TOKENIZER_RUN VAR_RUN OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import mars
from mars import checkpoint

CARD = """# notes

A conditional MARS model for single notes: 4 s at 16 kHz, by instrument family, source, pitch and velocity.
Tokenizer {tokenizer:.1f} M and VAR {var:.1f} M parameters, {codes:,} codes, {tokens} tokens per note; in float16.

- **Data:** {notes:,} notes rendered from the soundfont FluidR3 GM (Frank Wen, MIT licence), {train:,} of them for
  training; instruments are either for training or held out, never both. Rendered notes are not recordings: expect the
  sound of a General MIDI synthesizer.
- **Training:** tokenizer {tokenizer_steps:,} steps in {tokenizer_minutes:.0f} min, VAR {var_steps:,} steps in
  {var_minutes:.0f} min, on two CPU cores (bfloat16 autocast), without the adversarial term.
  `make pretrained` trains it anew.
- **Held-out instruments:** reconstruction of the normalised spectrogram MSE {mse:.4f}, MAE {mae:.4f} (1.0 is
  {per_unit:.0f} dB); VAR cross-entropy {loss:.3f} nats per token.

| scale | {scales} |
|---|{rules}|
| codes used | {used} |
| their perplexity | {perplexity} |
| VAR cross-entropy, nats | {per_scale} |

- **Licence:** Apache-2.0, weights and code.
"""


def log(run: Path) -> list[dict[str, Any]]:
    """The run's log lines."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def minutes(lines: list[dict[str, Any]], batch: int) -> float:
    """Time spent in training steps."""
    steps = [line for line in lines if "notes_per_s" in line]
    done = [0, *(line["step"] for line in steps)]
    return sum((b - a) * batch / line["notes_per_s"] for a, b, line in zip(done, done[1:], steps, strict=False)) / 60


def row(values: list[Any]) -> str:
    """Cells of a Markdown table."""
    return " | ".join(map(str, values))


def main() -> None:
    tokenizer_run, var_run, out = map(Path, sys.argv[1:])
    model = mars.load(var_run)
    assert model.var is not None
    train = model.config.train
    first, second = log(tokenizer_run), log(var_run)
    rebuilt = [line for line in first if "val_mse" in line][-1]
    predicted = [line for line in second if "val_loss" in line][-1]
    record = checkpoint.read_json(var_run / "run.json")
    model.card = CARD.format(
        tokenizer=sum(p.numel() for p in model.tokenizer.parameters()) / 1e6,
        var=sum(p.numel() for p in model.var.parameters()) / 1e6,
        codes=model.config.tokenizer.codebook_size,
        tokens=model.config.tokenizer.tokens,
        notes=record["notes"],
        train=record["train_notes"],
        tokenizer_steps=rebuilt["step"],
        tokenizer_minutes=minutes(first, train.tokenizer.notes_per_step),
        var_steps=predicted["step"],
        var_minutes=minutes(second, train.var.notes_per_step),
        mse=rebuilt["val_mse"],
        mae=rebuilt["val_mae"],
        per_unit=(model.config.audio.max_db - model.config.audio.min_db) / 2,
        loss=predicted["val_loss"],
        scales=row([f"{h}x{w}" for h, w in model.config.tokenizer.scales]),
        rules="|".join("---" for _ in model.config.tokenizer.scales),
        used=row(rebuilt["codes_used"]),
        perplexity=row(rebuilt["perplexity"]),
        per_scale=row([f"{value:.2f}" for value in predicted["val_loss_per_scale"]]),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    model.save(out, torch.float16)
    size = sum(p.stat().st_size for p in out.iterdir()) / 1e6
    print(f"{out}: {size:.1f} MB")


if __name__ == "__main__":
    main()
