"""What the metrics share: how a metric is described, and what it is given to compute from.

A metric is one file of this package. It has the mathematics, as functions of tensors; functions of a `Row` that ask for
these tensors and return figures; and `MEASURES`, a tuple of `Measure`, from which `mars.evaluate.metrics.catalogue`
knows it. Nothing else names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from mars.evaluate import mel
from mars.evaluate.bootstrap import SEED, Estimate
from mars.evaluate.embedders.roles import Role
from mars.evaluate.extractor import NoteFeatures, Unavailable
from mars.evaluate.report import MODES, Figure, Mode, Profile

ALL_NOTES = "all notes at once"  # what a value and its interval are of, which usually is published of parts
NO_TRAINING_NOTES = "want the training notes (`train`)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """What every metric is computed under."""

    profile: Profile = "standard"
    mode: Mode = "generation"
    seed: int = SEED
    bins: int = 100  # of NDB
    as_published: bool = False  # vinay2022: the pitch network stands in for the instrument network, and the reverse

    @property
    def label_order(self) -> str:
        """Which network stands for which, in words."""
        return "as published" if self.as_published else "correct"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's row in tables."""

    name: str  # in reports and settings
    label: str  # for people; in parentheses a network in place of the usual one
    better: Literal[-1, 0, 1]  # where its better values are: lower, nowhere that is known, higher
    place: int  # in tables, and in what is computed: ascending


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """Metrics that are computed together."""

    metrics: tuple[Metric, ...]
    compute: Mapping[Profile, Callable[[Row], Mapping[str, Figure]]]  # a figure for each metric, by name
    role: Role | None = None  # of the network that it listens with; None: it takes log-mels
    modes: tuple[Mode, ...] = MODES
    training: Literal["unused", "used", "needed"] = "unused"  # the notes that a model learned from
    prepare: Callable[[Sequence[Row]], None] | None = None  # called with all rows before the first is computed

    @property
    def names(self) -> tuple[str, ...]:
        """Of the metrics."""
        return tuple(metric.name for metric in self.metrics)


@dataclass(eq=False)
class Row:
    """Notes, the real ones that they are compared with, and how."""

    name: str  # "" for the notes that are evaluated, or that of a baseline
    real: NoteFeatures
    fake: NoteFeatures
    conditions: Conditions
    train: NoteFeatures | None = None
    paired: bool = True  # of reconstructions: each note has its original at its own place
    prepared: dict[str, Any] = field(default_factory=dict)  # what `Measure.prepare` has put there, by metric

    @cached_property
    def errors(self) -> mel.Nearest:
        """Mel errors of each note against its original, or against the nearest real note.

        Raises:
            Unavailable: there are no originals.
        """
        if self.conditions.mode == "generation":
            return mel.nearest(self.fake.log_mel, self.real.log_mel)
        if not self.paired:
            raise Unavailable("the notes have no originals to be compared with")
        return mel.Nearest(torch.arange(len(self.fake)), mel.mel_errors(self.real.log_mel, self.fake.log_mel))


def figure(estimate: Estimate, params: Mapping[str, Any], details: Mapping[str, Any] | None = None) -> Figure:
    """Return the figure of an estimate with its interval."""
    return Figure(value=estimate.value, low=estimate.low, high=estimate.high, params=params, details=details or {})
