"""Pitch and instrument classifiers, whose features and logits PKID, IKID, PIS and IIS are made of.

A classifier is a directory: `network.safetensors`, `classifier.json` (what it was trained on, how well it does, in what
order its classes are) and a manifest. `mars.train.classifier` makes them.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

import mars
from mars import checkpoint, runtime
from mars.config import from_document
from mars.errors import CheckpointError, ConfigError
from mars.evaluate.bootstrap import SEED
from mars.evaluate.embedders.features import Embedding
from mars.evaluate.embedders.frontend import PUBLISHED, SAMPLE_RATE, WHOLE_NOTE, FrontEnd
from mars.evaluate.embedders.networks import Network, build, outline
from mars.evaluate.embedders.weights import git_blob, read_weights
from mars.evaluate.sets import NoteSet
from mars.runtime import stream

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


def task_of(name: str) -> Task:
    """Return the task called `name`. Raises `ConfigError`."""
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
        """Return features (n, 1, dim) before the last layer and logits (n, classes) of waveforms (n, samples)."""
        features = self.network.features(_pictures(self, waveforms))
        return Embedding(features.unsqueeze(1).cpu(), self.network.fc(features).cpu())


@torch.inference_mode()
def logits_vinay2022(
    classifier: Classifier,
    notes: NoteSet,
    *,
    seed: int = SEED,
    key: int = 0,
    progress: Callable[[int, int], None] | None = None,  # called with notes done and all of them
) -> Tensor:
    """Compute logits (n, classes) as the published scripts for the kernel distances compute them: in training mode.

    Nothing in pkid.py of Nistal et al. 2020 takes it out of that; ikid.py is taken to be alike. So batch norm has its
    statistics from 50 notes at a time, in the order of the files, and half of the features are dropped at random,
    by us with a seed. A note's logits depend on the others, so no cache holds them. Their Inception Score is of a
    network in evaluation mode, `Classifier.embed`.

    key: tells two sets with one seed apart.

    Raises:
        DataError: a note's file has changed or gone since the set was opened.
    """
    network = copy.deepcopy(classifier.network).train()  # it adapts its running statistics
    device = network.fc.weight.device
    parts = []
    for start in range(0, len(notes), BATCH_VINAY2022):
        rows = range(start, min(start + BATCH_VINAY2022, len(notes)))
        with runtime.exact_float32():
            features = network.features(_pictures(classifier, notes.waveforms(rows)))
            keep = torch.rand(features.shape, generator=stream(seed, key, start)) < 0.5
            parts.append(network.fc(features * keep.to(device) * 2).cpu())
        if progress is not None:
            progress(rows.stop, len(notes))
    return torch.cat(parts)


def _pictures(classifier: Classifier, waveforms: Tensor) -> Tensor:
    """Return the network's input (n, 1, height, width) for waveforms (n, samples), on its device."""
    pictures = classifier.pipeline(waveforms.to(classifier.network.fc.weight.device))
    return pictures.contiguous(memory_format=torch.channels_last)


def placed(network: Network, device: str | torch.device) -> Network:
    """Return the network on the device, its convolutions laid out as those of CPUs and tensor cores run fastest."""
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its stub


def weights_dir() -> Path | None:
    """Return the folder that $MARS_WEIGHTS_DIR names, which need not be there yet; None where it is not set.

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
    """Return where classifiers are kept: the folder that $MARS_WEIGHTS_DIR names, or else classifiers/."""
    return weights_dir() or Path("classifiers")


def locate(task: Task, preset: str, path: Path | None = None) -> Path:
    """Return a classifier's directory: `path`, or `<task>-<preset>` in `folder` or among those that come with mars.

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
    """Load the classifier in the directory `path`; `force` takes one that its gate refuses.

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
    description = from_document(_Document, document, listing, CheckpointError)
    try:
        shapes = outline(description.network, description.outputs)
        checkpoint.check_shapes(shapes, weights)
        shapes.eval()(torch.empty(1, 1, *description.front_end.picture, device="meta"))
    except (ConfigError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{listing} cannot be used: its network does not fit: {reason}") from None
    network = build(description.network, description.outputs)
    checkpoint.load_weights(network, checkpoint.read_tensors(weights), weights)
    result = Classifier(
        id=description.id,
        task=description.task,
        classes=description.classes,
        pipeline=description.front_end,
        network=placed(network, device).eval().requires_grad_(False),
        sha256=description.sha256,
        document=document,
    )
    if result.below_gate and not force:
        raise CheckpointError(f"{path}: {result.below_gate}; train it longer or on more notes, or take it with `force`")
    return result


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
        document = describe(task, f"{task}-sony", "inception", None, PUBLISHED, weights) | {
            "preset": "sony",
            "gate": None,  # how accurate they are was not published
            "imported": {"git_blob": blob, "published": blob in PUBLISHED_BLOBS},
            "validation": None,
        }
        write(written[path], weights, document)
    return written


def describe(
    task: Task,
    identity: str,
    network: str,
    classes: tuple[str, ...] | None,
    front_end: FrontEnd,
    weights: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Return the part of classifier.json that every classifier has; what made it is to be added."""
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


def write(out: Path, weights: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Write the new directory of a classifier, whole or not at all. Raises `OSError`."""
    checkpoint.write_directory(out, {"network": weights}, {"classifier": document})
