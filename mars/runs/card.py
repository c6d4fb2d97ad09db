"""The card of a run's model, in Markdown: data and their licence, settings, figures, how it is used.

A card depends on what was trained and how far, not on when, where or in how many sittings: an interrupted run ends with
the bytes of one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mars
from mars.config import Config
from mars.errors import ConfigError
from mars.files import read_bytes
from mars.pages.html import number
from mars.runs.log import FILE, LARGEST
from mars.text import printable

STATED = "Not stated: who hands the model on says so."
FIGURES = {  # of a validation, in words
    "val_mse": "mean squared error of held-out spectrograms in [-1, 1]",
    "val_mae": "mean absolute error of these",
    "val_loss": "cross-entropy on held-out notes, nats per token",
    "val_accuracy": "tokens of held-out notes that were the likeliest",
}
SCALES = {
    "codes_used": "codes used", "perplexity": "their perplexity", "val_loss_per_scale": "cross-entropy, nats",
    "val_accuracy_per_scale": "likeliest tokens",
}  # fmt: skip


def regular(values: Mapping[str, Any], every: int, steps: int) -> bool:
    """Whether a line of the log is of a validation that every run of these settings has, however often it stops."""
    judged = any(name in values for name in FIGURES)
    return judged and (values["step"] % every == 0 or values["step"] == steps)


def last_validation(run: Path, step: int, every: int, steps: int) -> dict[str, Any]:
    """The last regular validation in the log of a run up to a step; empty where there is none."""
    file = run / FILE
    for line in reversed(read_bytes(file, ConfigError, LARGEST).splitlines() if file.is_file() else []):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] > step:
            continue
        if regular(record, every, steps):
            return record
    return {}


def made(
    record: Mapping[str, Any],
    config: Config,
    step: int,
    figures: Mapping[str, Any],
    parameters: Mapping[str, int],
    tokenizer_card: str = "",
) -> str:
    """The card.

    Args:
        record: what `run.json` says.
        step: whose weights these are.
        figures: the validation that judges them; empty without one.
        parameters: of "tokenizer" and, if there is one, "transformer".
        tokenizer_card: of a transformer's tokenizer, whose section is taken over.
    """
    stage = str(record["stage"])
    audio, train = config.audio, getattr(config.train, stage)
    named = {"tokenizer": "Tokenizer", "var": "Transformer"}[stage]
    sizes = ", ".join(f"{name} {count / 1e6:.1f} M parameters" for name, count in parameters.items())
    asked = f", by {', '.join(config.var.condition)}" if stage == "var" and config.var.condition else ""
    kind = "A MARS model that generates" if stage == "var" else "A MARS tokenizer of"
    intro = (
        f"{kind} notes of {audio.samples / audio.sample_rate:.3g} s at {audio.sample_rate:,} Hz{asked}: {sizes}; "
        f"{config.tokenizer.tokens:,} tokens a note out of {config.tokenizer.codebook_size:,} codes, coarse to fine."
    )
    origin = record.get("origin") or {}
    said = ", ".join(f"{key} {value}" for key, value in origin.items() if key != "licence")
    data = (
        f"{record['notes']:,} notes, {record['train_notes']:,} of them for training"
        f"{f' ({printable(said)})' if said else ''}; fingerprint {record['data']}. "
        f"Their licence: {printable(str(origin.get('licence', 'unknown')))}."
    )
    sections = {"Data": data}
    if inherited := section(tokenizer_card, "Tokenizer"):
        sections["Tokenizer"] = inherited
    sections[named] = "\n".join(
        [
            f"Preset {config.preset}, step {step:,} of {train.steps:,}, {train.notes_per_step} notes a step, "
            f"seed {record['seed']}, mars {mars.__version__}.",
            *(
                []
                if figures
                else ["", "No notes were held out, or none were heard yet: nothing is known of its quality."]
            ),
            *_figures(figures, config.tokenizer.scales),
        ]
    )
    use = ["```python", "import mars", "", 'model = mars.Model.from_pretrained("MODEL")  # this folder, or user/name']
    if stage == "var":
        use += ['model.generate(1, seed=0)[0].save("note.wav")']
    else:
        use += ["tokens = model.encode(waveforms)  # (B, samples) in [-1, 1]", "sound = model.decode(tokens)"]
    sections["Use"] = "\n".join([*use, "```", "", "The commands of mars take the folder as `model`."])
    sections["Licence"] = STATED
    return joined(f"MARS {'model' if stage == 'var' else 'tokenizer'}, preset {config.preset}", intro, sections)


def _figures(figures: Mapping[str, Any], scales: Sequence[tuple[int, int]]) -> list[str]:
    """The figures of a validation as lists and a table."""
    known = [f"- {words}: {number(float(figures[key]))}" for key, words in FIGURES.items() if _is_number(figures, key)]
    rows = [
        f"| {words} | {' | '.join(number(float(value)) for value in figures[key])} |"
        for key, words in SCALES.items()
        if isinstance(figures.get(key), list) and len(figures[key]) == len(scales)
    ]
    lines = ["", f"On held-out notes, at step {figures['step']:,}:", "", *known] if known else []
    if rows:
        lines += [
            "",
            f"| scale | {' | '.join(f'{h}x{w}' for h, w in scales)} |",
            "|---" * (len(scales) + 1) + "|",
            *rows,
        ]
    return lines


def _is_number(figures: Mapping[str, Any], key: str) -> bool:
    return isinstance(figures.get(key), int | float) and not isinstance(figures[key], bool)


def joined(title: str, intro: str, sections: Mapping[str, str]) -> str:
    """A card of its parts."""
    return "\n\n".join([f"# {title}", intro, *(f"## {name}\n\n{text}" for name, text in sections.items())]) + "\n"


def parts(card: str) -> tuple[str, str, dict[str, str]]:
    """Title, introduction and sections of a card that `joined` made."""
    head, *rest = card.split("\n## ")
    title, _, intro = head.removeprefix("# ").partition("\n")
    found = (text.partition("\n") for text in rest)
    return title.strip(), intro.strip(), {name.strip(): text.strip() for name, _, text in found}


def section(card: str, name: str) -> str:
    """The text of a section of a card; empty without it."""
    return parts(card)[2].get(name, "")


def handed_on(card: str, name: str, licence: str | None) -> str:
    """A card under a name, with a header as the Hugging Face Hub reads it."""
    _, intro, sections = parts(card)
    sections["Use"] = sections.get("Use", "").replace("MODEL", name)
    if licence is not None:
        sections["Licence"] = printable(licence)
    header = {"license": licence or "other", "library_name": "mars", "tags": ["audio", "music", "sound-generation"]}
    lines = [f"{key}: {json.dumps(value)}" for key, value in header.items()]  # JSON is YAML
    return "\n".join(["---", *lines, "---", joined(printable(name), intro, sections)])
