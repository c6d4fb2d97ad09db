"""Log-mels and embeddings of sets of notes, each computed when a metric first asks for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mars.errors import ConfigError
from mars.evaluate import mel
from mars.evaluate.embedders import features
from mars.evaluate.embedders.classifier import Classifier
from mars.evaluate.embedders.features import Embedder, Embedding
from mars.evaluate.embedders.roles import Embedders, Role
from mars.evaluate.sets import NoteSet
from mars.runtime import thread_pool

Progress = Callable[[str, int, int], None]  # called with what is being done, notes done and all of them
T = TypeVar("T")

_BATCH = 64  # notes whose log-mels a thread computes at a time
_BLOCK = 4096  # notes whose log-mels are in memory at once where they come block after block


class Unavailable(ConfigError):
    """A metric cannot be computed, as a network or a set of notes is missing; the message says which."""


class Extractor:
    """Computes what the metrics ask for, and notes which networks it used."""

    def __init__(self, embedders: Embedders, cache: Path | None = None, progress: Progress | None = None) -> None:
        self._embedders, self._cache, self._progress = embedders, cache, progress
        self.used: dict[str, dict[str, Any]] = {}  # by id: sha256, front_end and, of a classifier, accuracy

    def network(self, role: Role) -> Embedder:
        """Return the role's network. Raises `Unavailable` where there is none."""
        embedder = self._embedders[role]
        if isinstance(embedder, str):
            raise Unavailable(embedder)
        return embedder

    def embed(self, notes: NoteSet, role: Role) -> Embedding:
        """Return the features of the notes by the role's network. Raises `Unavailable` where there is none."""
        embedder = self.network(role)
        self.used[embedder.id] = {"sha256": embedder.sha256, "front_end": embedder.front_end}
        if isinstance(embedder, Classifier):
            validation = embedder.document["validation"]
            self.used[embedder.id]["accuracy"] = None if validation is None else validation["accuracy"]
        return features.embed(notes, embedder, self._cache, progress=self.progress(f"{embedder.id}, {notes.source}"))

    def log_mel(self, notes: NoteSet, size: int | None = None) -> Iterator[Tensor]:
        """Yield log-mel spectrograms (up to `size`, 80, 251), block after block, on all cores; None: all at once."""
        progress, size = self.progress(f"log-mel, {notes.source}"), size or len(notes)
        with thread_pool(torch.get_num_threads()) as pool:
            for start in range(0, len(notes), size):
                rows = range(start, min(start + size, len(notes)))
                batches = [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
                block = torch.empty(len(rows), *mel.SHAPE)
                blocks = pool.map(lambda batch: mel.log_mel(notes.waveforms(batch)), batches)
                for batch, place, part in zip(batches, block.split(_BATCH), blocks, strict=True):
                    place.copy_(part)
                    progress(batch[-1] + 1, len(notes))
                yield block

    def progress(self, what: str) -> Callable[[int, int], None]:
        """Return the callback (notes done, total) for the task `what`."""
        return (lambda done, of: None) if self._progress is None else partial(self._progress, what)


class NoteFeatures:
    """A set of notes with what metrics ask of it.

    Args:
        whole: a set that the notes are a part of, whose features are taken where they are known.
    """

    def __init__(self, notes: NoteSet, extractor: Extractor, whole: NoteFeatures | None = None) -> None:
        self.notes, self._extractor, self._whole = notes, extractor, whole
        self._embeddings: dict[Role, Embedding] = {}
        self._computed: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self.notes)

    @cached_property
    def log_mel(self) -> Tensor:
        """Log-mel spectrograms (n, 80, 251)."""
        if self._whole is not None:
            return self._whole.log_mel[self._places]
        return next(self._extractor.log_mel(self.notes))

    def log_mel_blocks(self) -> Iterator[Tensor]:
        """Yield log-mel spectrograms (n, 80, 251) in blocks, for sets that do not fit into memory."""
        return self._extractor.log_mel(self.notes, _BLOCK)

    def log_mel_of(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Return the log-mel spectrograms of the notes at these indices only, without caching them."""
        return next(self._extractor.log_mel(self.notes.subset(rows)))

    def network(self, role: Role) -> Embedder:
        """Return the role's network. Raises `Unavailable` where there is none."""
        return self._extractor.network(role)

    def embedding(self, role: Role) -> Embedding:
        """Return the features by the role's network. Raises `Unavailable` where there is none."""
        if role not in self._embeddings:
            if self._whole is None:
                self._embeddings[role] = self._extractor.embed(self.notes, role)
            else:
                whole = self._whole.embedding(role)
                logits = None if whole.logits is None else whole.logits[self._places]
                self._embeddings[role] = Embedding(whole.frames[self._places], logits)
        return self._embeddings[role]

    def frames(self, role: Role) -> Tensor:
        """Return the role's features (n, t, dim). Raises `Unavailable` where there is no network."""
        return self.embedding(role).frames

    def logits(self, role: Role) -> Tensor:
        """Return the logits (n, classes) of the role's classifier. Raises `Unavailable` where there is none."""
        logits = self.embedding(role).logits
        if logits is None:
            raise Unavailable(f"{self.network(role).id} is no classifier")
        return logits

    def classes(self, role: Role) -> tuple[str, ...]:
        """Return the class of each logit. Raises `Unavailable` where nobody knows."""
        network = self.network(role)
        if network.classes is None:
            raise Unavailable(f"nobody knows which class of {network.id} is which")
        return network.classes

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return the result of `compute`, called once for each key: a cache for what metrics need more than once."""
        if key not in self._computed:
            self._computed[key] = compute()
        result: T = self._computed[key]
        return result

    def progress(self, what: str) -> Callable[[int, int], None]:
        """Return the callback (notes done, total) for the task `what` on these notes."""
        return self._extractor.progress(f"{what}, {self.notes.source}")

    def forget(self) -> None:
        """Free the memory of log-mels and embeddings."""
        self.__dict__.pop("log_mel", None)
        self._embeddings.clear()

    @cached_property
    def _places(self) -> Tensor:
        """Of the notes in the whole that they are a part of."""
        assert self._whole is not None
        places = {key: i for i, key in enumerate(self._whole.notes.keys)}
        return torch.tensor([places[key] for key in self.notes.keys])
