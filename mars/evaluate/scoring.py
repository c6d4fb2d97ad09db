"""All metrics of a set of notes against real ones, in one profile, with the baselines that make them readable."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mars
from mars.config import AudioConfig
from mars.errors import ConfigError, DataError
from mars.evaluate.baselines import ANCHOR, ORACLE, REAL_VS_REAL, anchor, griffin_lim_oracle, halves
from mars.evaluate.embedders.features import Embedder
from mars.evaluate.embedders.roles import ROLES, Embedders, Role
from mars.evaluate.extractor import Extractor, NoteFeatures, Progress, Unavailable
from mars.evaluate.metrics import catalogue
from mars.evaluate.metrics.measure import NO_TRAINING_NOTES, Conditions, Measure, Row
from mars.evaluate.report import Figure, Report, Sounds
from mars.evaluate.sets import NoteSet, pair

SHOWN = 6  # notes that a report lets one hear


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings(Conditions):
    """What to compute, and how.

    Raises:
        ConfigError: a metric does not exist, or not in this profile or mode.
    """

    metrics: tuple[str, ...] = ()  # each must be computed; none named: all that can be

    def __post_init__(self) -> None:
        known, possible = catalogue.table(), self.possible
        for name in self.metrics:
            if name not in known:
                raise ConfigError(f"unknown metric {name!r}; known: {', '.join(known)}")
            if name not in possible:
                raise ConfigError(
                    f"{name} is not computed for {self.mode} in the profile {self.profile}; "
                    f"that has {', '.join(possible)}"
                )
        if self.as_published and self.profile != "vinay2022":
            raise ConfigError("the label order as published exists in the profile vinay2022 only")

    @property
    def possible(self) -> tuple[str, ...]:
        """The metrics of this profile and mode, in the order of tables."""
        available = {
            name
            for measure in catalogue.measures()
            if self.profile in measure.compute and self.mode in measure.modes
            for name in measure.names
        }
        return tuple(name for name in catalogue.table() if name in available)

    @property
    def selected(self) -> tuple[str, ...]:
        """The metrics to compute, in the order of tables."""
        return tuple(name for name in self.possible if not self.metrics or name in self.metrics)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What computes them."""
        selected = set(self.selected)
        return tuple(measure for measure in catalogue.measures() if not selected.isdisjoint(measure.names))

    @property
    def roles(self) -> frozenset[Role]:
        """Of the networks that the metrics to compute listen with."""
        roles = (measure.role for measure in self.measures)
        return frozenset(_swapped(role) if self.as_published else role for role in roles if role is not None)


def check(settings: Settings, embedders: Embedders, train: NoteSet | None) -> None:
    """Check that there is what the metrics that the settings name need beside the notes that are evaluated.

    Raises:
        Unavailable: a network, or the training notes, are not there.
    """
    networks = _roles(settings, embedders)
    for measure in settings.measures:
        reason = measure.role and networks[measure.role]
        if not isinstance(reason, str):
            reason = NO_TRAINING_NOTES if measure.training == "needed" and train is None else None
        for name in measure.names:
            if reason is not None and name in settings.metrics:
                raise Unavailable(f"{name}: {reason}")


@dataclass(frozen=True)
class Evaluation:
    """A report, and some of the notes to hear: a title and the waveforms (samples,) by what they are."""

    report: Report
    examples: list[tuple[str, dict[str, Tensor]]]


def evaluate(
    real: NoteSet,
    fake: NoteSet,
    embedders: Embedders,
    settings: Settings,
    *,
    cache: Path | None = None,
    train: NoteSet | None = None,
    audio: AudioConfig | None = None,
    baselines: bool = True,
    progress: Progress | None = None,
    device: str = "cpu",
    produced: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Score notes against real ones, paired by their ids if they are reconstructions.

    Args:
        cache: folder of features, see `mars.evaluate.embedders.features`; None: none are kept.
        train: notes that a model learned from: NDB's bins are made of them, and copies of them looked for.
        audio: front end of the Griffin-Lim oracle; None: the default one.
        baselines: whether to compute the rows real-vs-real, griffin-lim oracle and anchor as well.
        device, produced: for the report: where the networks ran, how the notes were made.

    Raises:
        ConfigError: a metric that the settings name needs what is not there.
        DataError: notes do not pair up, cannot be read any more, or are too few for a metric that the settings name.
    """
    began = time.perf_counter()
    check(settings, embedders, train)
    if settings.mode == "reconstruction":
        real, fake = pair(real, fake)
        unlabelled = fake.pitch < 0
        fake = replace(fake, pitch=np.where(unlabelled, real.pitch, fake.pitch))
    networks = _roles(settings, embedders)
    extractor = Extractor(networks, cache, progress)
    learned = None if train is None else NoteFeatures(train, extractor)
    truth = NoteFeatures(real, extractor)
    rows = [Row("", truth, NoteFeatures(fake, extractor), settings, learned)]
    if baselines:
        one, other = (NoteFeatures(half, extractor, truth) for half in halves(real, settings.seed))
        usual = AudioConfig()  # also where the model's is at another rate than the notes are heard at
        front_end = audio if audio is not None and audio.sample_rate == usual.sample_rate else usual
        oracle = griffin_lim_oracle(real, front_end, seed=settings.seed)
        rows += [
            Row(REAL_VS_REAL, one, other, settings, learned, paired=False),
            Row(ORACLE, truth, NoteFeatures(oracle, extractor), settings, learned),
            Row(ANCHOR, truth, NoteFeatures(anchor(real), extractor), settings, learned),
        ]
    for measure in settings.measures:
        if measure.prepare is not None:
            measure.prepare(rows)
    examples: list[tuple[str, dict[str, Tensor]]] = []
    scored: dict[str, dict[str, Figure]] = {}
    for row in rows:
        scored[row.name] = _score(row, settings, networks)
        if not row.name and "mse" in settings.selected:
            examples = _shown(rows)
        row.fake.forget()
    sets = {"real": real, "fake": fake}
    if train is not None and any(measure.training != "unused" for measure in settings.measures):
        sets["train"] = train
    report = Report(
        profile=settings.profile,
        mode=settings.mode,
        seed=settings.seed,
        metrics=scored.pop(""),
        baselines=scored,
        sets={name: _sounds(notes) for name, notes in sets.items()},
        embedders=extractor.used,
        versions=_versions(),
        device=device,
        threads=torch.get_num_threads(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - began, 1),
        produced=produced or {},
        table=catalogue.headings(),
    )
    return Evaluation(report, examples)


def _score(row: Row, settings: Settings, networks: Mapping[Role, Embedder | str]) -> dict[str, Figure]:
    """Compute a row's metrics; in the row of the evaluated notes those that the settings name must be available."""
    results: dict[str, Figure] = {}
    for measure in settings.measures:
        names = [name for name in measure.names if name in settings.selected]
        embedder = None if measure.role is None else networks[measure.role]
        if not isinstance(embedder, str):
            for side in (row.real, row.fake):  # outside of the clause: a file that has changed spoils everything
                side.embedding(measure.role) if measure.role else side.log_mel
        began = time.perf_counter()
        try:
            if isinstance(embedder, str):
                raise Unavailable(embedder)
            figures = measure.compute[settings.profile](row)
        except (ConfigError, DataError) as error:
            if not row.name and settings.metrics:
                raise type(error)(f"{', '.join(names)}: {error}") from None
            figures = {name: Figure(reason=str(error)) for name in names}
        same: dict[str, Any] = {
            "n_real": len(row.real),
            "n_fake": len(row.fake),
            "embedder": embedder.id if embedder is not None and not isinstance(embedder, str) else "",
            "seconds": round(time.perf_counter() - began, 3),
        }
        results |= {name: replace(figures[name], **same) for name in names}
    return {name: results[name] for name in settings.selected}


def _roles(settings: Settings, embedders: Embedders) -> dict[Role, Embedder | str]:
    """Return the network of each role with these settings."""
    return {role: embedders[_swapped(role) if settings.as_published else role] for role in ROLES}


def _swapped(role: Role) -> Role:
    """Return the role whose network stands in for this one's in the published constants."""
    swapped: dict[Role, Role] = {"pitch": "instrument", "instrument": "pitch"}
    return swapped.get(role, role)


def _shown(rows: Sequence[Row]) -> list[tuple[str, dict[str, Tensor]]]:
    """Return notes with low, middling and high errors beside their originals, or the real notes nearest to them."""
    row = rows[0]
    order = row.errors.errors.mse.argsort()
    places = torch.linspace(0, len(order) - 1, min(SHOWN, len(order)), dtype=torch.float64).round().long()
    examples = []
    for rank in places.tolist():
        i = int(order[rank])
        original = int(row.errors.index[i])
        sounds = {"real": row.real.notes, "evaluated": row.fake.notes}
        sounds |= {other.name: other.fake.notes for other in rows if other.name in (ORACLE, ANCHOR)}
        title = f"{row.fake.notes.names[i]}: error {rank + 1:,} of {len(order):,}"
        waveforms = {
            what: notes.waveforms([i if what == "evaluated" else original])[0] for what, notes in sounds.items()
        }
        examples.append((title, waveforms))
    return examples


def _sounds(notes: NoteSet) -> Sounds:
    record = notes.record
    return Sounds(
        source=notes.source,
        notes=len(notes),
        fingerprint=notes.fingerprint,
        resampled=len(record.resampled),
        padded=len(record.padded),
        cut=len(record.cut),
        clipped=len(record.clipped),
        refused=record.refused,
    )


def _versions() -> dict[str, str]:
    versions = {"mars": mars.__version__}
    for name in ("numpy", "torch", "torchmetrics", "scikit-learn"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
