"""A run's model as a folder of its own, to keep or to hand on."""

from __future__ import annotations

from pathlib import Path

import torch

from mars import model
from mars.errors import ConfigError
from mars.files import read_json
from mars.runs import card
from mars.runs.record import read_document, read_record


def export(
    run: Path, out: Path, *, last: bool = False, half: bool = False, licence: str | None = None, name: str | None = None
) -> list[Path]:
    """Write the model of a run, and its card, to the new folder `out`; the files.

    Args:
        last: the weights of the last step saved, where others did better on held-out notes.
        half: weights in float16.
        licence: of the model; None: its card says that it is not stated.
        name: of the model in its card; None: that of the folder.

    Raises:
        ConfigError: `run` is no run folder, or `out` exists.
        CheckpointError: the run has no model yet, or that is damaged.
        OSError: it cannot be written.
    """
    read_record(run)
    if out.exists():
        raise ConfigError(f"`out` {out} exists; name a new folder")
    found = run / ("best" if (run / "best").is_dir() and not last else "model")
    trained = model.load(found if found.name == "best" else run)
    text = trained.card or _old(run, found, trained)
    trained.card = card.handed_on(text, name or out.absolute().name, licence)
    trained.save(out, torch.float16 if half else torch.float32)
    return sorted(out.iterdir())


def _old(run: Path, found: Path, trained: model.Model) -> str:
    """The card of a model that was written before runs had one."""
    record = read_document(run)
    train = getattr(trained.config.train, record["stage"])
    if found.name == "best":
        step = int(read_json(run / "best.json", ConfigError)["step"])
    else:
        step = max((int(p.name[5:]) for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdigit()), default=0)
    figures = card.last_validation(run, step, train.validate_every, train.steps)
    return card.made(record, trained.config, step, figures, trained.parameters)
