"""Training of the pitch and instrument classifiers that evaluations use (`mars.evaluate.embedders.classifier`).

It trains on a dataset's train split and is validated on its valid split, which shares no instrument with it; the test
split, which is for evaluations, is never used.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from mars import runtime, terminal
from mars.data import SPLITS, Dataset
from mars.errors import ConfigError, DataError, Diverged
from mars.evaluate.embedders.classifier import PRESETS, Preset, Task, describe, placed, write
from mars.evaluate.embedders.frontend import SAMPLE_RATE
from mars.evaluate.embedders.networks import Network, build, initialise
from mars.labels import FAMILIES, SOURCES
from mars.runtime import stream
from mars.train.loop import batch_indices

_LINE_EVERY = 30.0  # s between lines where there is no terminal


@dataclass(frozen=True)
class Examples:
    """The notes of a dataset that a task can use, with the class of each."""

    classes: tuple[str, ...]
    train: np.ndarray  # (n,) indices into the dataset
    valid: np.ndarray
    targets: np.ndarray  # (N,) class of every note of the dataset, -1 = none


def examples(dataset: Dataset, task: Task, preset: Preset) -> Examples:
    """Select the notes that `task` trains on and is validated on.

    Raises:
        DataError: there are no such notes, or an instrument is in both splits.
    """
    usable = np.full(len(dataset), True)
    if preset.acoustic:
        usable &= dataset.column("source") == SOURCES.index("acoustic")
    split = dataset.column("split")
    if task == "pitch":
        low, high = preset.pitches
        pitch = dataset.column("pitch")
        usable &= (pitch >= low) & (pitch <= high)
        targets, classes = pitch - low, tuple(str(pitch) for pitch in range(low, high + 1))
    else:
        family = dataset.column("family")
        usable &= (family >= 0) & (family < len(FAMILIES))  # a family of the dataset's own is none of the classes
        learnt = np.unique(family[usable & (split == 0)]) if preset.acoustic else np.arange(len(FAMILIES))
        usable &= np.isin(family, learnt)
        targets, classes = np.searchsorted(learnt, family).astype(np.int32), tuple(FAMILIES[i] for i in learnt)
    train, valid = (np.flatnonzero(usable & (split == SPLITS.index(name))) for name in ("train", "valid"))
    kind = "acoustic notes" if preset.acoustic else "notes"
    for name, rows in (("train", train), ("valid", valid)):
        if not len(rows):
            raise DataError(f"the split {name} has no {kind} with a known {task} among the classes; pack more notes")
    instrument = dataset.column("instrument")
    shared = np.intersect1d(instrument[train], instrument[valid])
    if len(shared):
        raise DataError(
            f"instrument {dataset.instruments[shared[0]]} is in the train and the valid split, so that accuracy would "
            "mean nothing; pack the notes again and hold out instruments"
        )
    return Examples(classes, train, valid, np.where(usable, targets, -1))


def train(
    dataset: Dataset,
    task: Task,
    preset: str,
    out: Path,
    *,
    seed: int = 0,
    epochs: int | None = None,
    max_time: float | None = None,  # s
    device: torch.device | None = None,
    console: Console | None = None,
) -> Path:
    """Train a classifier into the new directory `out`, which it returns; the weights are those of the best epoch.

    On a CPU the same arguments and number of threads give the same weights, unless `max_time` cuts in.

    Raises:
        ConfigError, DataError: an argument, a setting or the dataset cannot be used.
        Diverged: the loss is not finite.
        OSError: `out` cannot be written.
    """
    began = time.monotonic()
    device, console = device or torch.device("cpu"), console or terminal.LogConsole()
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    if out.exists():
        raise ConfigError(f"`out` {out} exists; name a new folder")
    settings = PRESETS[preset]
    epochs = epochs or settings.epochs
    if dataset.sample_rate != SAMPLE_RATE:
        raise DataError(f"the dataset is at {dataset.sample_rate} Hz, classifiers want {SAMPLE_RATE}; pack it again")
    notes = examples(dataset, task, settings)
    network = placed(initialise(build(settings.network, len(notes.classes)), seed), device)
    size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    runtime.free_space(out, 2 * size)
    parameters = sum(p.numel() for p in network.parameters())
    console.print(
        f"{task}: preset {preset}, {parameters / 1e6:.2f} M parameters, {len(notes.classes)} classes, "
        f"{len(notes.train):,} training and {len(notes.valid):,} held-out notes, into {out}"
    )
    dataset.verify()
    fit = _Fit(network, settings, dataset, notes, seed, epochs)
    best, weights = _learn(fit, max_time, console)
    gate = settings.gate[task]
    document = describe(task, f"{task}-{preset}", settings.network, notes.classes, settings.front_end, weights) | {
        "preset": preset,
        "gate": gate,
        "data": {
            "fingerprint": dataset.fingerprint,
            "origin": {key: value for key, value in dataset.origin.items() if isinstance(value, str | int)},
            "train_notes": len(notes.train),
            "valid_notes": len(notes.valid),
            "classes_present": len(np.unique(notes.targets[notes.train])),
        },
        "training": {
            "seed": seed,
            "epochs": fit.epoch,
            "best_epoch": best["epoch"],
            "steps": fit.done,
            "seconds": round(time.monotonic() - began, 1),
            "device": device.type,
            "threads": torch.get_num_threads(),
            "bfloat16": runtime.native_bfloat16(device),
        },
        "validation": best,
    }
    write(out, weights, document)
    console.print(
        f"{out}: accuracy {best['accuracy']:.4f} on notes of instruments it has not heard (epoch {best['epoch']})"
    )
    if best["accuracy"] < gate:
        console.print(f"warning: that is below {gate}, so metrics will refuse it unless they are told to with `force`")
    return out


def _learn(fit: _Fit, max_time: float | None, console: Console) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train to the last epoch, for `max_time` seconds (but a step at least) or until nothing gets better.

    Returns the validation metrics of the best epoch, and its weights.
    """
    best: dict[str, Any] = {"accuracy": -1.0, "epoch": 0}
    weights: dict[str, Tensor] = {}
    began = time.monotonic()
    with terminal.progress(console, line_every=_LINE_EVERY) as tell:
        late = False
        while fit.done < fit.steps and fit.epoch - best["epoch"] < fit.settings.patience and not late:
            losses = []
            for _ in range(fit.per_epoch):
                losses.append(fit.step())
                tell("step", fit.done, fit.steps, f"loss {losses[-1]:.3f}")
                late = max_time is not None and time.monotonic() - began > max_time
                if late:
                    break
            fit.epoch += 1
            validation = fit.validate()
            better = validation["accuracy"] > best["accuracy"]
            if better:
                best = {**validation, "epoch": fit.epoch}
                weights = {name: t.detach().to("cpu", copy=True) for name, t in fit.network.state_dict().items()}
            console.print(
                f"epoch {fit.epoch}  loss {np.mean(losses):.3f}  held-out loss {validation['loss']:.3f}  "
                f"accuracy {validation['accuracy']:.4f}{'  best' if better else ''}"
            )
    return best, weights


class _Fit:
    """The optimiser, the steps and the validation of one network."""

    def __init__(
        self, network: Network, settings: Preset, dataset: Dataset, notes: Examples, seed: int, epochs: int
    ) -> None:
        self.network, self.settings, self.dataset, self.notes, self.seed = network, settings, dataset, notes, seed
        self.device = network.fc.weight.device
        self.per_epoch = math.ceil(len(notes.train) / settings.batch_size)
        self.steps = epochs * self.per_epoch
        self.epoch = self.done = 0  # epochs begun and steps made
        self.optimizer = torch.optim.AdamW(
            network.parameters(), settings.lr, settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        warmup = settings.warmup * self.steps

        def rate(step: int) -> float:
            if not settings.warmup:
                return 1.0
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 + 0.5 * math.cos(math.pi * min((step - warmup) / max(self.steps - warmup, 1), 1))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)

    def pictures(self, rows: np.ndarray) -> Tensor:
        """Return the network's input for these notes."""
        waveforms = self.dataset.waveforms(rows).to(self.device)
        return self.settings.front_end(waveforms).contiguous(memory_format=torch.channels_last)

    def targets(self, rows: np.ndarray) -> Tensor:
        """Return the class of each of these notes."""
        return torch.from_numpy(self.notes.targets[rows].astype(np.int64)).to(self.device)

    def step(self) -> float:
        """Do one update and return the loss. Raises `Diverged`."""
        rows = batch_indices(self.seed, self.done, self.settings.batch_size, self.notes.train)
        chance = stream(self.seed, 1, self.done)
        pictures = _masked(self.pictures(rows), self.settings.masks, chance)
        keep = (torch.rand(len(rows), self.network.dim, generator=chance) < 0.5).to(self.device)
        self.network.train()
        with runtime.autocast(self.device, "auto"):
            logits = self.network.fc(self.network.features(pictures) * keep * 2)  # dropout of a half
        loss = F.cross_entropy(logits.float(), self.targets(rows))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(f"the loss at step {self.done} is not finite; try another `seed`")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        return value

    @torch.inference_mode()
    def validate(self) -> dict[str, Any]:
        """Return the loss, the accuracy and the kinds of errors on the held-out notes."""
        self.network.eval()
        valid = self.notes.valid
        parts = [self.network(self.pictures(rows)).float() for rows in np.array_split(valid, -(-len(valid) // 64))]
        logits, targets = torch.cat(parts), self.targets(valid)
        loss = float(F.cross_entropy(logits, targets))
        predicted = logits.argmax(1).cpu().numpy()
        return {"loss": loss, "notes": len(valid), **_judge(predicted, self.dataset, self.notes)}


def _judge(predicted: np.ndarray, dataset: Dataset, notes: Examples) -> dict[str, Any]:
    """Return held-out accuracy, all and by family, and confusions of instruments or kinds of pitch errors."""
    truth = notes.targets[notes.valid]
    right = predicted == truth
    family = dataset.column("family")[notes.valid]
    names = [*dataset.words.get("family", FAMILIES), "unknown"]  # family -1 is the last
    result: dict[str, Any] = {
        "accuracy": float(right.mean()),
        "families": {
            names[i]: {"notes": int((family == i).sum()), "accuracy": float(right[family == i].mean())}
            for i in np.unique(family)
        },
    }
    if notes.classes[0] in FAMILIES:
        table = np.zeros((len(notes.classes),) * 2, int)
        np.add.at(table, (truth, predicted), 1)
        result["confusion"] = table.tolist()  # rows: what it was; columns: what it was taken for
    else:
        away = np.abs(predicted - truth)
        result["octave_errors"] = float(((away > 0) & (away % 12 == 0)).mean())
        result["semitone_errors"] = float((away == 1).mean())
    return result


def _masked(pictures: Tensor, masks: int, chance: torch.Generator) -> Tensor:
    """Return pictures (B, 1, H, W) with spans of frames, `masks` in each, set to 0."""
    frames = torch.arange(pictures.shape[3])
    for _ in range(masks):
        length, start = torch.rand(2, len(pictures), 1, generator=chance)
        length = length * len(frames) / 4
        start = start * (len(frames) - length)
        hidden = (frames >= start) & (frames < start + length)
        pictures = pictures.masked_fill(hidden[:, None, None].to(pictures.device), 0.0)
    return pictures
