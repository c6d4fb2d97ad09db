"""Pitch and instrument classifiers, whose features and logits PKID, IKID, PIS and IIS are made of.

A classifier is a directory: `network.safetensors`, `classifier.json` (what it was trained on, how well it does, in what
order its classes are) and a manifest. It is trained on a dataset's train split and judged on its valid split, which
shares no instrument with it; the test split, which is what one evaluates with, is never looked at.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save
from torch import Tensor

import mars
from mars import checkpoint, runtime, terminal
from mars.config import from_document
from mars.data import SPLITS, Dataset
from mars.errors import CheckpointError, ConfigError, DataError, Diverged
from mars.evaluate.embedders.features import Embedding
from mars.evaluate.embedders.frontend import PUBLISHED, SAMPLE_RATE, WHOLE_NOTE, FrontEnd
from mars.evaluate.embedders.networks import Network, build, initialise, outline
from mars.evaluate.embedders.weights import git_blob, read_weights
from mars.evaluate.metrics.bootstrap import SEED
from mars.evaluate.sets import NoteSet
from mars.labels import FAMILIES, SOURCES
from mars.runtime import stream
from mars.train.loop import batch_indices

Task = Literal["pitch", "instrument"]
TASKS: tuple[Task, ...] = ("pitch", "instrument")
FORMAT, VERSION = "mars-classifier", 1
WEIGHTS_DIR = "MARS_WEIGHTS_DIR"  # environment variable: where classifiers are kept
# Git's name for a file of the two published networks (github.com/SonyCSLParis/Comparing-Representations-for-Audio-
# Synthesis-using-GANs). The constants of that code name each as the other, so no name is trusted.
PUBLISHED_BLOBS: dict[str, Task] = {
    "05c033f02e3cd2480c5693a0996e533d07aa638f": "pitch",
    "6d78ccef109fd8298eef380df9b396a2c482f602": "instrument",
}
PUBLISHED_PITCHES = 27
MOST_CLASSES = 10_000
BATCH_VINAY2022 = 50  # notes that the published scripts look at together
_LINE_EVERY = 30.0  # s between lines where there is no terminal


def task_of(name: str) -> Task:
    """The task of that name. Raises `ConfigError`."""
    for task in TASKS:
        if task == name:
            return task
    raise ConfigError(f"unknown task {name!r}; known: {', '.join(TASKS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """How a classifier is built and trained."""

    network: str
    front_end: FrontEnd
    pitches: tuple[int, int]  # lowest and highest MIDI note that is a class
    acoustic: bool  # learn from acoustic notes alone, and have as classes the families among them
    epochs: int  # at most
    patience: int  # epochs without a better accuracy before training stops
    batch_size: int
    lr: float  # Adam; peak
    betas: tuple[float, float]
    weight_decay: float
    warmup: float  # share of the steps, before a cosine to zero; 0: the rate is constant
    masks: int  # spans of up to a quarter of the frames that are silenced at random (SpecAugment, arXiv:1904.08779)
    gate: Mapping[str, float]  # by task: accuracy on the valid split below which it is refused


PRESETS: dict[str, Preset] = {
    # As published (arXiv:2006.09266 and its training script), but for the gate.
    "sony": Preset(
        network="inception", front_end=PUBLISHED, pitches=(44, 70), acoustic=True,
        epochs=50, patience=10, batch_size=50, lr=1e-3, betas=(0.0, 0.99), weight_decay=0.0, warmup=0.0, masks=0,
        gate={"pitch": 0.9, "instrument": 0.5},
    ),
    "full": Preset(
        network="inception", front_end=WHOLE_NOTE, pitches=(0, 127), acoustic=False,
        epochs=30, patience=8, batch_size=64, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, warmup=0.1, masks=2,
        gate={"pitch": 0.9, "instrument": 0.5},
    ),
    "tiny": Preset(
        network="tiny", front_end=WHOLE_NOTE, pitches=(0, 127), acoustic=False,
        epochs=20, patience=8, batch_size=32, lr=2e-3, betas=(0.9, 0.999), weight_decay=0.01, warmup=0.1, masks=2,
        gate={"pitch": 0.7, "instrument": 0.4},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Classifier:
    """A trained network with its front end, an `Embedder`; see `load`."""

    id: str  # pitch-full, instrument-sony...
    task: Task
    classes: tuple[str, ...] | None  # MIDI numbers or families in the order of the logits; None: nobody knows
    pipeline: FrontEnd
    network: Network
    sha256: str
    document: Mapping[str, Any]  # classifier.json
    sample_rate: int = SAMPLE_RATE  # Hz

    @property
    def dim(self) -> int:
        """Numbers in a frame."""
        return self.network.dim

    @property
    def front_end(self) -> str:
        """Hex sum of the front end's settings."""
        return self.pipeline.hash

    @property
    def below_gate(self) -> str:
        """What its gate has against it; empty where there is nothing, or no gate."""
        gate = self.document["gate"]
        if gate is None or (accuracy := self.document["validation"]["accuracy"]) >= gate:
            return ""
        return f"accuracy {accuracy:.3f} on held-out notes, want {gate}"

    @torch.inference_mode()
    def embed(self, waveforms: Tensor) -> Embedding:
        """Features (n, 1, dim) before the last layer and logits (n, classes) of waveforms (n, samples)."""
        features = self.network.features(_pictures(self, waveforms))
        return Embedding(features.unsqueeze(1).cpu(), self.network.fc(features).cpu())


@torch.inference_mode()
def logits_vinay2022(
    made: Classifier,
    notes: NoteSet,
    *,
    seed: int = SEED,
    key: int = 0,
    progress: Callable[[int, int], None] | None = None,  # called with notes done and all of them
) -> Tensor:
    """Logits (n, classes) as the published scripts for the kernel distances compute them: in training mode.

    Nothing in pkid.py of Nistal et al. 2020 takes it out of that; ikid.py is taken to be alike. So batch norm has its
    statistics from 50 notes at a time, in the order of the files, and half of the features are dropped at random,
    by us with a seed. A note's logits depend on the others, so no cache holds them. Their Inception Score is of a
    network in evaluation mode, `Classifier.embed`.

    key: tells two sets with one seed apart.

    Raises:
        DataError: a note's file has changed or gone since the set was opened.
    """
    network = copy.deepcopy(made.network).train()  # it adapts its running statistics
    device = network.fc.weight.device
    parts = []
    for start in range(0, len(notes), BATCH_VINAY2022):
        rows = range(start, min(start + BATCH_VINAY2022, len(notes)))
        with runtime.exact_float32():
            features = network.features(_pictures(made, notes.waveforms(rows)))
            keep = torch.rand(features.shape, generator=stream(seed, key, start)) < 0.5
            parts.append(network.fc(features * keep.to(device) * 2).cpu())
        if progress is not None:
            progress(rows.stop, len(notes))
    return torch.cat(parts)


def _pictures(made: Classifier, waveforms: Tensor) -> Tensor:
    """What the network sees, on its device."""
    pictures = made.pipeline(waveforms.to(made.network.fc.weight.device))
    return pictures.contiguous(memory_format=torch.channels_last)


def _placed(network: Network, device: str | torch.device) -> Network:
    """The network on the device, its convolutions laid out as those of CPUs and tensor cores run fastest."""
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its stub


def weights_dir() -> Path | None:
    """The folder that $MARS_WEIGHTS_DIR names, which need not be there yet; None where it is not set.

    Raises:
        ConfigError: it names something else.
    """
    name = os.environ.get(WEIGHTS_DIR)
    if not name:
        return None
    try:
        usable = stat.S_ISDIR(os.stat(name).st_mode)
    except FileNotFoundError:
        usable = True
    except OSError:  # too long a name, or one below a file
        usable = False
    if not usable:
        raise ConfigError(f"{WEIGHTS_DIR}: want a folder, got {name!r:.200}")
    return Path(name)


def folder() -> Path:
    """Where classifiers are kept: the folder that $MARS_WEIGHTS_DIR names, or else classifiers/."""
    return weights_dir() or Path("classifiers")


def locate(task: Task, preset: str, path: Path | None = None) -> Path:
    """The directory of a classifier: `path`, or `<task>-<preset>` in `folder` or among those that come with mars.

    Raises:
        CheckpointError: it is not there, and what would make it.
    """
    name = f"{task}-{preset}"
    packaged = Path(str(resources.files("mars").joinpath("assets", "classifiers", name)))
    candidates = (folder() / name, packaged) if path is None else (path,)
    for candidate in candidates:
        if (candidate / "classifier.json").is_file():
            return candidate
    command = "import-sony" if preset == "sony" else "train-classifier"
    raise CheckpointError(
        f"{candidates[0]} is not a classifier (no classifier.json); `mars-eval {command}` makes one of "
        f"task {task} and preset {preset}, {WEIGHTS_DIR} may name another folder, and the preset tiny comes with mars"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Format:
    """What of classifier.json says how to read the rest."""

    format: str
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Document:
    """What of classifier.json is needed to use the classifier."""

    id: str
    task: Task
    network: str
    outputs: int
    classes: tuple[str, ...] | None
    front_end: FrontEnd
    sha256: str
    gate: float | None
    validation: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]{1,100}", self.id, re.ASCII):  # the cache has a folder of that name
            raise ConfigError(f"id must be of letters, digits and hyphens, got {self.id!r:.80}")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ConfigError(f"sha256 must be 64 hex digits, got {self.sha256!r:.80}")
        if not 1 <= self.outputs <= MOST_CLASSES:
            raise ConfigError(f"outputs must be 1 to {MOST_CLASSES:,}, got {self.outputs}")
        if self.classes is not None and len(set(self.classes)) != self.outputs:
            raise ConfigError(f"want {self.outputs:,} different classes, got {len(set(self.classes)):,}")
        if self.task == "pitch" and not all(c in map(str, range(128)) for c in self.classes or ()):
            raise ConfigError("the classes of a pitch classifier must be MIDI numbers")
        if self.gate is not None and not isinstance((self.validation or {}).get("accuracy"), int | float):
            raise ConfigError("there is a gate and no validation.accuracy to hold against it")


def load(path: Path, device: str | torch.device = "cpu", *, force: bool = False) -> Classifier:
    """The classifier in the directory `path`; `force` takes one that its gate refuses.

    Raises:
        CheckpointError: it is missing, damaged, of another version, or less accurate than its preset asks.
    """
    if not (path / "classifier.json").is_file():
        raise CheckpointError(f"{path} is not a classifier (no classifier.json)")
    checkpoint.verify(path)
    listing, weights = path / "classifier.json", path / "network.safetensors"
    document = checkpoint.read_json(listing)
    known = from_document(_Format, document, listing, CheckpointError)
    if (known.format, known.version) != (FORMAT, VERSION):
        raise CheckpointError(f"{path}: want {FORMAT} version {VERSION}, got {known.format} version {known.version}")
    told = from_document(_Document, document, listing, CheckpointError)
    try:
        shapes = outline(told.network, told.outputs)
        checkpoint.check_shapes(shapes, weights)
        shapes.eval()(torch.empty(1, 1, *told.front_end.picture, device="meta"))
    except (ConfigError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{listing} cannot be used: its network does not fit: {reason}") from None
    network = build(told.network, told.outputs)
    checkpoint.load_weights(network, checkpoint.read_tensors(weights), weights)
    made = Classifier(
        id=told.id,
        task=told.task,
        classes=told.classes,
        pipeline=told.front_end,
        network=_placed(network, device).eval().requires_grad_(False),
        sha256=told.sha256,
        document=document,
    )
    if made.below_gate and not force:
        raise CheckpointError(f"{path}: {made.below_gate}; train it longer or on more notes, or take it with `force`")
    return made


@dataclass(frozen=True)
class Examples:
    """The notes of a dataset that a task can use, with the class of each."""

    classes: tuple[str, ...]
    train: np.ndarray  # (n,) indices into the dataset
    valid: np.ndarray
    targets: np.ndarray  # (N,) class of every note of the dataset, -1 = none


def examples(dataset: Dataset, task: Task, preset: Preset) -> Examples:
    """What `task` learns from and is judged on.

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
        usable &= family >= 0
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
        ConfigError, DataError: something asked for cannot be used.
        Diverged: the loss is not finite.
        OSError: `out` cannot be written.
    """
    began = time.monotonic()
    device, console = device or torch.device("cpu"), console or terminal.console(soft_wrap=True)
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    if out.exists():
        raise ConfigError(f"`out` {out} exists; name a new folder")
    settings = PRESETS[preset]
    epochs = epochs or settings.epochs
    if dataset.sample_rate != SAMPLE_RATE:
        raise DataError(f"the dataset is at {dataset.sample_rate} Hz, classifiers want {SAMPLE_RATE}; pack it again")
    notes = examples(dataset, task, settings)
    network = _placed(initialise(build(settings.network, len(notes.classes)), seed), device)
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
    document = _document(task, f"{task}-{preset}", settings.network, notes.classes, settings.front_end, weights) | {
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
    _write(out, weights, document)
    console.print(
        f"{out}: accuracy {best['accuracy']:.4f} on notes of instruments it has not heard (epoch {best['epoch']})"
    )
    if best["accuracy"] < gate:
        console.print(f"warning: that is below {gate}, so metrics will refuse it unless they are told to with `force`")
    return out


def _learn(fit: _Fit, max_time: float | None, console: Console) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train to the last epoch, for `max_time` seconds (but a step at least) or until nothing gets better.

    Returns what validation said after the best epoch, and the weights of then.
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
            judged = fit.validate()
            better = judged["accuracy"] > best["accuracy"]
            if better:
                best = {**judged, "epoch": fit.epoch}
                weights = {name: t.detach().to("cpu", copy=True) for name, t in fit.network.state_dict().items()}
            console.print(
                f"epoch {fit.epoch}  loss {np.mean(losses):.3f}  held-out loss {judged['loss']:.3f}  "
                f"accuracy {judged['accuracy']:.4f}{'  best' if better else ''}"
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
        """What the network sees of these notes."""
        waveforms = self.dataset.waveforms(rows).to(self.device)
        return self.settings.front_end(waveforms).contiguous(memory_format=torch.channels_last)

    def targets(self, rows: np.ndarray) -> Tensor:
        """Class of each of these notes."""
        return torch.from_numpy(self.notes.targets[rows].astype(np.int64)).to(self.device)

    def step(self) -> float:
        """One update; the loss. Raises `Diverged`."""
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
        """Loss, accuracy and where the errors are, on the held-out notes."""
        self.network.eval()
        valid = self.notes.valid
        parts = [self.network(self.pictures(rows)).float() for rows in np.array_split(valid, -(-len(valid) // 64))]
        logits, targets = torch.cat(parts), self.targets(valid)
        loss = float(F.cross_entropy(logits, targets))
        predicted = logits.argmax(1).cpu().numpy()
        return {"loss": loss, "notes": len(valid), **_judge(predicted, self.dataset, self.notes)}


def _judge(predicted: np.ndarray, dataset: Dataset, notes: Examples) -> dict[str, Any]:
    """Accuracy on the held-out notes, all and by family; with confusions of instruments, or kinds of pitch errors."""
    truth = notes.targets[notes.valid]
    right = predicted == truth
    family = dataset.column("family")[notes.valid]
    names = [*FAMILIES, "unknown"]  # family -1 is the last
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
    """Pictures (B, 1, H, W) with spans of frames, `masks` in each, set to 0."""
    frames = torch.arange(pictures.shape[3])
    for _ in range(masks):
        length, start = torch.rand(2, len(pictures), 1, generator=chance)
        length = length * len(frames) / 4
        start = start * (len(frames) - length)
        hidden = (frames >= start) & (frames < start + length)
        pictures = pictures.masked_fill(hidden[:, None, None].to(pictures.device), 0.0)
    return pictures


def import_sony(files: Mapping[Task, Path], out: Path, *, force: bool = False) -> dict[Path, Path]:
    """Convert the published networks to directories `<task>-sony` in `out`, which it returns for each file.

    files: by the task that the user takes them for; which is which their content decides.
    force: take a file that is not one of the published ones for what its number of classes suggests (27: pitch).

    Raises:
        CheckpointError: a file is unknown, unreadable, of another network, or both are of one task.
        ConfigError: there is such a directory already.
    """
    recognised: dict[Task, tuple[Path, dict[str, Tensor], str]] = {}
    for path in files.values():
        blob = git_blob(path)
        tensors = read_weights(path)
        outputs = len(tensors["fc.weight"]) if "fc.weight" in tensors and tensors["fc.weight"].ndim == 2 else 0
        if not outputs:
            raise CheckpointError(f"{path} has no layer fc of logits; it is not one of the published networks")
        if blob not in PUBLISHED_BLOBS and not force:
            raise CheckpointError(
                f"{path} is not one of the published networks (its git blob is {blob}); to take it for what its "
                f"{outputs} classes suggest, use `force`"
            )
        task = PUBLISHED_BLOBS.get(blob, "pitch" if outputs == PUBLISHED_PITCHES else "instrument")
        if task in recognised:
            raise CheckpointError(f"{recognised[task][0]} and {path} are both {task} networks; give one of each")
        recognised[task] = path, tensors, blob
    for task in recognised:
        if (out / f"{task}-sony").exists():
            raise ConfigError(f"{out / f'{task}-sony'} exists; name another folder with `out`")
    written: dict[Path, Path] = {}
    for task, (path, tensors, blob) in recognised.items():
        network = build("inception", len(tensors["fc.weight"]))
        checkpoint.load_weights(network, tensors, path)
        weights = network.state_dict()
        written[path] = out / f"{task}-sony"
        document = _document(task, f"{task}-sony", "inception", None, PUBLISHED, weights) | {
            "preset": "sony",
            "gate": None,  # how accurate they are was not published
            "imported": {"git_blob": blob, "published": blob in PUBLISHED_BLOBS},
            "validation": None,
        }
        _write(written[path], weights, document)
    return written


def _document(
    task: Task,
    identity: str,
    network: str,
    classes: tuple[str, ...] | None,
    front_end: FrontEnd,
    weights: Mapping[str, Tensor],
) -> dict[str, Any]:
    """The part of classifier.json that every classifier has."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "id": identity,
        "task": task,
        "network": network,
        "outputs": len(weights["fc.weight"]),
        "classes": classes,
        "front_end": asdict(front_end),
        "sha256": hashlib.sha256(save({name: t.contiguous() for name, t in weights.items()})).hexdigest(),
        "versions": {"mars": mars.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def _write(out: Path, weights: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    checkpoint.write_directory(out, {"network": weights}, {"classifier": document})
