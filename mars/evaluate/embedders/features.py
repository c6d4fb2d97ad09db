"""Features of notes: what a network computes from each, once, and a cache of them on disk.

The cache is a folder. In it, each embedder (its weights and its front end) has a folder, and in that are parts: each a
directory of `mars.checkpoint` with the features of some notes, which are known by the content of their files. A part
appears whole or not at all, and is never changed, so several processes may use a cache at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mars import checkpoint
from mars.errors import CheckpointError, ConfigError, DataError
from mars.evaluate.sets import NoteSet
from mars.runtime import exact_float32, thread_pool

PART = 512  # notes; what an interrupted run loses at most


@dataclass(frozen=True)
class Embedding:
    """The features of n notes, float32 on the CPU."""

    frames: Tensor  # (n, t, dim): t frames a note, 1 where the network looks at the whole note
    logits: Tensor | None = None  # (n, classes)


class Embedder(Protocol):
    """A network that turns notes into features."""

    @property
    def id(self) -> str:
        """Its name in reports, e.g. `pitch-full`."""

    @property
    def sample_rate(self) -> int:
        """Hz, of the waveforms it takes."""

    @property
    def dim(self) -> int:
        """Numbers in a frame."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """What each logit stands for; None: there are no logits, or nobody knows."""

    @property
    def sha256(self) -> str:
        """Hex sum of the weights."""

    @property
    def front_end(self) -> str:
        """Hex sum of everything but the weights that decides the features."""

    def embed(self, waveforms: Tensor) -> Embedding:
        """Return features of waveforms (n, samples) in [-1, 1]; those of a note do not depend on the others."""


def embed(
    notes: NoteSet,
    embedder: Embedder,
    cache: Path | None = None,
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,  # called with notes done and all of them
) -> Embedding:
    """Embed all notes of a set, in its order; features that are not in `cache` are computed and put there.

    They are computed in float32 proper, and not in TF32, so that those of a CPU and a GPU may share a cache.

    Raises:
        DataError: a note's file has changed or gone since the set was opened, or its features are not finite.
        CheckpointError: a part of the cache is damaged.
        OSError: the cache cannot be written.
    """
    if notes.sample_rate != embedder.sample_rate:
        raise ConfigError(f"{embedder.id} takes notes at {embedder.sample_rate} Hz, got {notes.sample_rate}")
    if not len(notes):
        raise ConfigError(f"{embedder.id}: want at least one note, got none from {notes.source}")
    folder = None if cache is None else cache / f"{embedder.id}-{_digest([embedder.sha256, embedder.front_end])}"
    embeddings = {} if folder is None else _read(folder, set(notes.keys))
    missing: list[int] = []
    waiting: set[str] = set()
    for i, key in enumerate(notes.keys):  # a note that a set holds twice is computed once
        if key not in embeddings and key not in waiting:
            missing.append(i)
            waiting.add(key)
    done = len(notes) - len(missing)
    for start in range(0, len(missing), PART):
        part = missing[start : start + PART]
        computed = []
        for waveforms in _ahead(notes, part, batch_size):
            with exact_float32():
                computed.append(embedder.embed(waveforms))
            done += len(waveforms)
            if progress is not None:
                progress(done, len(notes))
        tensors = {"frames": torch.cat([e.frames for e in computed])}
        if computed[0].logits is not None:
            tensors["logits"] = torch.cat([e.logits for e in computed if e.logits is not None])
        for i, frames in zip(part, tensors["frames"], strict=True):
            if not bool(frames.isfinite().all()):
                raise DataError(
                    f"{embedder.id} has no finite features for {notes.names[i]} of {notes.source}; remove it"
                )
        keys = [notes.keys[i] for i in part]
        if folder is not None:
            _write(folder, keys, tensors)
        embeddings |= _rows(keys, tensors)
    rows = [embeddings[key] for key in notes.keys]
    logits = [row.logits for row in rows if row.logits is not None]
    return Embedding(torch.stack([row.frames for row in rows]), torch.stack(logits) if logits else None)


def _ahead(notes: NoteSet, rows: Sequence[int], size: int) -> Iterator[Tensor]:
    """Yield waveforms of the rows in batches; a second thread reads the next one."""
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    with thread_pool(1) as reader:
        upcoming = reader.submit(notes.waveforms, batches[0])
        for batch in batches[1:]:
            ready, upcoming = upcoming.result(), reader.submit(notes.waveforms, batch)
            yield ready
        yield upcoming.result()


def _rows(keys: Sequence[str], tensors: checkpoint.Tensors) -> dict[str, Embedding]:
    """Return the features of each note: `Embedding` without its first dimension."""
    logits = tensors.get("logits")
    return {key: Embedding(tensors["frames"][i], None if logits is None else logits[i]) for i, key in enumerate(keys)}


def _read(folder: Path, requested: set[str]) -> dict[str, Embedding]:
    """Return embeddings of the requested notes, by key, as far as the parts in `folder` hold them."""
    embeddings: dict[str, Embedding] = {}
    for part in sorted(folder.glob("part-*")):
        try:
            keys = checkpoint.read_json(part / "notes.json")
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                raise CheckpointError(f"{part / 'notes.json'} does not list notes")
            if requested.isdisjoint(keys):
                continue
            checkpoint.verify(part)
            tensors = checkpoint.read_tensors(part / "features.safetensors")
            if "frames" not in tensors or any(t.ndim == 0 or len(t) != len(keys) for t in tensors.values()):
                raise CheckpointError(f"{part} does not hold the features of {len(keys)} notes")
        except CheckpointError as error:
            raise CheckpointError(f"{error}; remove {part}, and its features will be computed again") from None
        rows = _rows(keys, tensors)
        embeddings |= {key: rows[key] for key in requested & rows.keys()}
    return embeddings


def _write(folder: Path, keys: list[str], tensors: checkpoint.Tensors) -> None:
    part = folder / f"part-{_digest(keys)}"
    try:
        checkpoint.write_directory(part, {"features": tensors}, {"notes": keys})
    except OSError:
        if not part.is_dir():  # otherwise another process has just written the same
            raise


def _digest(items: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(items).encode()).hexdigest()[:16]
