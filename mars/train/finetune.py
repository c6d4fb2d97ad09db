"""A model of one's own sounds: both stages in turn, each from the weights of a trained model, and what came of it.

    data/       the packed sounds, where a folder was given
    tokenizer/  the run of the first stage, var/ that of the second
    model/      the model: that of the step of var/ that the held-out sounds liked best
    notes/      new notes, with a page to hear them beside the sounds (index.html)
    result.json what was asked for, and the figures

Everything is found again by the same call, which goes on where it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from mars import lock, model, terminal
from mars.data import Dataset
from mars.data.folder import Pitch, pack_folder
from mars.data.packed import ALLOW_BAD
from mars.data.pitch import estimate
from mars.data.splits import spread
from mars.errors import ConfigError, DataError
from mars.evaluate import mel
from mars.evaluate.metrics.copy_ratio import copy_ratio
from mars.evaluate.sets import resampled
from mars.files import new_folder, read_json, write_atomically
from mars.notes import PAGE, NoteFolder, fill, stem
from mars.runs.compare import RUNS
from mars.runs.log import Log, read_log
from mars.runs.stage import StageName
from mars.runtime import set_threads
from mars.train.start import train

RESULT = "result.json"
FEWEST = 4  # different sounds; of fewer a model learns nothing but these
STEPS = 2000  # at most, far beyond where the held-out sounds of a small collection stop to improve
BATCH = 16  # notes
ORIGINALS = 8  # sounds shown beside the new notes
SHARES = {"tokenizer": 0.5, "var": 0.8}  # of the time that is left when the stage begins
# Rates by short trials (docs/own-sounds.md). A rate that stays and the running average of the weights in place of a
# falling rate: so a stage may end at any step.
SETTINGS: dict[StageName, dict[str, Any]] = {
    "tokenizer": {"lr": 1e-3, "validate_every": 10, "patience": 6},
    "var": {"lr": 1e-3, "validate_every": 5, "patience": 6},
}


@dataclass(frozen=True)
class Learned:
    """What a stage came to, judged on the sounds that were held out."""

    metric: str  # val_mse or val_loss
    start: float  # before the first step
    best: float
    best_step: int
    training: float | None  # the same of the training sounds, about the best step; None where that is the start
    steps: int

    @property
    def gap(self) -> float | None:
        """How much worse the held-out sounds are than those learned from: what was learned by heart."""
        return None if self.training is None else self.best - self.training


@dataclass(frozen=True)
class Judged:
    """What the new notes are like."""

    notes: int
    asked_pitch: int  # notes that were asked for a pitch
    right_pitch: int  # of these, those that have it by the estimate of `mars.data.pitch`
    copies: int  # notes nearer to a training sound than any two training sounds are to each other
    copy_ratio: float  # median; see `mars.evaluate.metrics.copy_ratio`


def finetune(
    source: Path,
    *,
    base: str | Path = model.DEFAULT,
    out: Path | None = None,
    max_time: float | None = 600.0,
    csv: Path | None = None,
    pitch: Pitch = "estimate",
    allow_bad: float = ALLOW_BAD,
    notes: int = 16,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    began: float | None = None,
    next_command: Callable[[Path], str] | None = None,
    console: Console | None = None,
) -> Path:
    """Let a trained model learn the sounds of a folder or a packed dataset; returns the folder `out`.

    Args:
        source: a folder of sounds, which are packed at the model's rate and length, or a packed dataset.
        base: the model to start from.
        out: None: a new folder under `runs/`; that of an interrupted call goes on.
        max_time: seconds for everything; None: until neither stage gets better.
        csv, pitch, allow_bad: of a folder; see `mars.data.folder.pack_folder`.
        notes: how many new notes are made at the end.
        began: the `time.monotonic()` that `max_time` counts from; None: now.
        next_command: the command to type next, given `out`; None: none is told.
        console: what is said goes there; None: to the logger `mars`.

    Raises:
        ConfigError, DataError, CheckpointError: something asked for cannot be used, or there are too few sounds.
        Diverged, DiskError: see `mars.train.loop.run`.
    """
    began = time.monotonic() if began is None else began
    console = console or terminal.LogConsole()
    set_threads(threads)
    trained = model.load(base)
    _check_base(trained, base)
    if out is None:
        out = new_folder(RUNS, f"finetune-{source.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}")
    asked = {"source": str(source.resolve()), "base": trained.hash, "seed": seed, "pitch": pitch, "notes": notes}
    _begin(out, asked)
    with lock.claim(out, console.print):
        path = _packed(source, out, trained, csv, pitch, allow_bad, console)
        dataset = Dataset.open(path)
        _check_sounds(dataset, path, trained, console)

        def left() -> float | None:
            return None if max_time is None else began + max_time - time.monotonic()

        def stage(name: StageName, **options: Any) -> Learned | None:
            """Run it to its end; None where a signal stopped it."""
            run, remaining = out / name, left()
            train(
                name,
                data=path,
                overrides=_settings(name, dataset, options.pop("condition", None)),
                out=run,
                max_time=None if remaining is None else remaining * SHARES[name],
                seed=seed,
                device=device,
                threads=threads,
                init=base,
                alone=False,
                console=console,
                **options,
            )
            log = read_log(run)
            end = next(reversed(list(log.events("finished", "stopped"))))
            return None if end.get("by") == "signal" else _learned(log, name, max_time)

        begun = (out / "var" / "run.json").is_file()  # then the tokenizer must stay as it is
        first = _learned(read_log(out / "tokenizer"), "tokenizer", max_time) if begun else stage("tokenizer")
        condition = _conditions(trained, dataset, console)
        second = first and stage("var", tokenizer=out / "tokenizer" / "best", condition=condition)
        if first is None or second is None:
            console.print(f"stopped; the same again with `out` {out} goes on", markup=False)
            return out
        made = model.load(out / "var" / "best", device)
        made.save(out / "model")
        judged = _notes(model.load(out, device), dataset, out / "notes", notes, seed, console)
        result = {**asked, "tokenizer": asdict(first), "var": asdict(second), "new_notes": asdict(judged)}
        write_atomically(out / RESULT, (json.dumps(result, indent=1) + "\n").encode())
        for line in _report(first, second, judged, out):
            console.print(line, markup=False)
        if next_command is not None:
            console.print(f"next: {next_command(out)}", markup=False)
    return out


def _check_base(trained: model.Model, base: str | Path) -> None:
    if trained.var is None:
        raise ConfigError(f"`base` {base} is a tokenizer only; name a model with both stages, such as {model.DEFAULT}")


def _begin(out: Path, asked: dict[str, Any]) -> None:
    """Note what was asked for in `out`, or see that it is the same as before."""
    file = out / RESULT
    if file.is_file():
        had = read_json(file, ConfigError)
        for name, value in asked.items():
            if not isinstance(had, dict) or had.get(name) != value:
                found = had.get(name) if isinstance(had, dict) else had
                raise ConfigError(f"`out` {out} was begun with {name} {found}, not {value}; name a new folder")
        return
    if (out.is_dir() and any(not file.name.startswith(".") for file in out.iterdir())) or out.is_file():
        raise ConfigError(f"`out` {out} exists and holds something else; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(asked, indent=1) + "\n").encode())


def _packed(
    source: Path,
    out: Path,
    trained: model.Model,
    csv: Path | None,
    pitch: Pitch,
    allow_bad: float,
    console: Console,
) -> Path:
    """The packed dataset: `source` itself, or what its sounds are packed into, as the model wants them."""
    if (source / "dataset.json").is_file():
        if csv is not None:
            raise ConfigError(f"`csv` is for a folder of sounds; {source} is packed already")
        return source
    path, audio = out / "data", trained.config.audio
    if not path.exists():
        with terminal.progress(console, unit="notes") as tell:
            packed = pack_folder(
                source, path, csv=csv, sample_rate=audio.sample_rate, seconds=audio.samples / audio.sample_rate,
                pitch=pitch, hold_out="notes", allow_bad=allow_bad,
                progress=lambda done, total: tell("packing", done, total),
            )  # fmt: skip
        known = int((packed.column("pitch") >= 0).sum())
        console.print(
            f"packed {len(packed):,} sounds at {audio.sample_rate:,} Hz into {path}: "
            f"{len(packed.instruments):,} instruments, {known:,} with a pitch; held out: {packed.packing.held_out}"
        )
    return path


def _check_sounds(dataset: Dataset, path: Path, trained: model.Model, console: Console) -> None:
    """Raise an error where nothing can be learned from the sounds."""
    rate = trained.config.audio.sample_rate
    if dataset.sample_rate != rate:
        raise ConfigError(
            f"{path} is at {dataset.sample_rate:,} Hz, the model to start from at {rate:,} Hz; pack the sounds at "
            "that rate, or train both stages on them from nothing"
        )
    sums = [hashlib.sha256(dataset.audio[i].tobytes()).digest() for i in range(len(dataset))]
    if len(set(sums)) < FEWEST:
        different = "" if len(set(sums)) == len(sums) else f", {len(set(sums)):,} of them different"
        raise DataError(f"{path}: want at least {FEWEST} different sounds, got {len(sums):,}{different}; add some")
    valid, learned = dataset.split("valid"), {sums[i] for i in dataset.split("train")}
    if not len(valid) or not len(learned):
        raise DataError(f"{path} holds nothing out to judge by; pack the sounds again with some held out")
    if twice := sum(sums[i] in learned for i in valid):
        console.print(
            f"warning: {twice:,} of {len(valid):,} held-out sounds are training sounds as well, so that what is "
            "learned by heart may look like success; remove the doubles"
        )


def _conditions(trained: model.Model, dataset: Dataset, console: Console) -> list[str]:
    """The conditions of the model to start from, the instrument, and the dataset's own labels.

    A label whose words are about as many as the sounds would only tell these apart, and is left out.
    """
    found = list(trained.transformer.config.condition)
    learning = dataset.labels(dataset.split("train"))
    for name in ("instrument", *dataset.own) if found else ():
        known = learning[name][learning[name] >= 0]
        if name in found or not len(known):
            continue
        if (words := len(np.unique(known))) > len(known) / 2:
            console.print(f"{name} is no condition: {words:,} of them for {len(known):,} sounds say little")
        else:
            found.append(name)
    return found


def _settings(stage: StageName, dataset: Dataset, condition: Sequence[str] | None) -> tuple[str, ...]:
    values = {
        **SETTINGS[stage], "steps": STEPS, "batch_size": min(BATCH, len(dataset.split("train"))), "accumulate": 1,
        "optimizer": "muon", "warmup": min(5 / STEPS, 1), "final_lr": 1.0, "schedule": "cosine", "adversarial": False,
        "validate_notes": 64, "log_every": 5, "save_every": 100, "sample_every": 0, "keep": 1,
    }  # fmt: skip
    settings = [f"train.{name}={json.dumps(value)}" for name, value in values.items()]
    return *settings, *([f"var.condition={json.dumps(list(condition))}"] if condition is not None else [])


def _learned(log: Log, stage: StageName, max_time: float | None) -> Learned:
    """What the log of a stage says. Raises `ConfigError` where there was no time for anything."""
    metric, training = ("val_mse", "reconstruction") if stage == "tokenizer" else ("val_loss", "loss")
    values = [(step, value) for step, value in log.series(metric) if value is not None]
    if len(values) < 2:
        raise ConfigError(
            f"the {stage} had no time for one validation on held-out sounds; give `max_time` more than {max_time:g} s"
        )
    best_step, best = min(values, key=lambda pair: (pair[1], pair[0]))
    near = [value for step, value in log.series(training) if step <= best_step and value is not None][-3:]
    return Learned(metric, values[0][1], best, best_step, statistics.mean(near) if near else None, log.step)


def _notes(made: model.Model, dataset: Dataset, path: Path, count: int, seed: int, console: Console) -> Judged:
    """Make new notes with the labels of the sounds, and a page of them; what they are like."""
    rows = spread(np.concatenate([dataset.split("valid"), dataset.split("train")]), count)
    ranges = made.ranges
    labels = [dataset.known(int(rows[i % len(rows)])) for i in range(count)]
    wanted = [{name: value for name, value in known.items() if ranges.takes(name, value)} for known in labels]
    conditions = [ranges.accepted(known, allow_untrained=True) for known in wanted]
    files = [f"{stem(i, count, condition)}.wav" for i, condition in enumerate(conditions)]
    audio = made.config.audio
    shown = spread(dataset.split("valid"), ORIGINALS)
    originals = {dataset.names[i]: _fitted(dataset.waveforms([i]), audio.samples)[0] for i in shown}
    record = {**made.record, "model": str(path.parent), "n": count, "seed": seed}
    waveforms = []
    title = "New notes, and sounds that were held out"
    folder = NoteFolder(path, record, files, conditions, audio, page=title, originals=originals)
    with fill(folder, console.print) as folder, terminal.progress(console, unit="notes") as tell:
        # All of them, also those that are there, which are heard below.
        for note in made.iterate(count, conditions=conditions, seed=seed, allow_untrained=True):
            waveforms.append(note.waveform)
            if note.index in folder.missing:
                folder.add(note.index, note.waveform)
            tell("notes", note.index + 1, count)
        folder.finish()
    asked = [condition["pitch"] for condition in conditions]
    heard = [estimate(waveform.numpy(), audio.sample_rate)[0] for waveform in waveforms]
    right = sum(want == got for want, got in zip(asked, heard, strict=True) if want is not None)
    copies, ratio = _copies(torch.stack(waveforms), dataset)
    return Judged(count, sum(pitch is not None for pitch in asked), right, copies, ratio)


def _copies(waveforms: Tensor, dataset: Dataset) -> tuple[int, float]:
    """How many of the waveforms (n, samples) are copies of training sounds, and the median copy ratio."""
    rate = dataset.sample_rate
    train, valid, new = (
        mel.log_mel(resampled(sounds, rate))
        for sounds in (*(dataset.waveforms(dataset.split(name)) for name in ("train", "valid")), waveforms)
    )
    nearest = mel.nearest(new, train)
    pairs = (train[i] - train[i + 1 :] for i in range(len(train) - 1))
    apart = min((float(difference.square().mean((1, 2)).min()) for difference in pairs), default=0.0)
    ratio = copy_ratio(nearest, mel.nearest(new, valid))
    return int((nearest.errors.mse < apart).sum()), float(ratio.median())


def _fitted(waveforms: Tensor, samples: int) -> Tensor:
    """Waveforms (B, n), cut or padded with zeros to (B, samples)."""
    return torch.nn.functional.pad(waveforms[:, :samples], (0, max(samples - waveforms.shape[1], 0)))


def _report(first: Learned, second: Learned, judged: Judged, out: Path) -> list[str]:
    lines = []
    for name, learned, unit in (("reconstruction", first, "squared error"), ("tokens", second, "nats")):
        change = 100 * (learned.best / learned.start - 1) if learned.start else math.nan
        gap = "" if learned.gap is None else f"; training sounds {learned.training:.4g}, gap {learned.gap:.4g}"
        lines.append(
            f"{name}: held-out {unit} {learned.start:.4g} -> {learned.best:.4g} ({change:+.0f} %) "
            f"at step {learned.best_step:,} of {learned.steps:,}{gap}"
        )
        if not learned.best_step:
            lines.append(f"warning: {name}: nothing was better than the model to start from, which was kept")
    pitched = f"{judged.right_pitch} of {judged.asked_pitch} have the pitch asked for; " if judged.asked_pitch else ""
    lines.append(
        f"notes: {judged.notes} new ones; {pitched}copies of training sounds: {judged.copies} "
        f"(copy ratio {judged.copy_ratio:.2f}); listen: {out / 'notes' / PAGE}"
    )
    return lines
