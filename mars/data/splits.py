"""Which notes a dataset keeps from training: whole instruments where there are enough, else single notes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "valid", "test")
HoldOut = Literal["instruments", "notes", "none"]

_FEW = 10  # instruments; of fewer none can be spared
_KEPT = 2 / 3  # of the notes at least are trained on


def split_instruments(names: Sequence[str], valid: float = 0.1, test: float = 0.1) -> list[int]:
    """Return the split of each instrument, an index into SPLITS, decided by the sha256 of its name alone.

    So a note never moves between splits when others join, but for this: of two instruments or more at
    least one is in train and one in valid, if need be the ones whose hashes are nearest.
    """

    def fraction(name: str) -> float:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") / 2**56

    order = sorted(range(len(names)), key=lambda i: (fraction(names[i]), names[i]))
    split = [0] * len(names)
    for i in order:
        place = fraction(names[i])
        split[i] = 1 if place < valid else 2 if place < valid + test else 0
    if len(names) > 1:
        if 1 not in split:
            split[order[0]] = 1
        if 0 not in split:
            split[order[-1]] = 0
    return split


def split_notes(names: Sequence[str], valid: float = 0.1) -> list[int]:
    """Return the split of each note, an index into SPLITS: a tenth is in valid, at least one of two or more.

    The sha256 of the names decides which, so that neighbours in a folder are as likely as any.
    """
    count = max(round(valid * len(names)), 1) if len(names) > 1 else 0
    order = sorted(range(len(names)), key=lambda i: (hashlib.sha256(names[i].encode()).digest(), names[i]))
    chosen = set(order[:count])
    return [int(i in chosen) for i in range(len(names))]


def hold_out(notes: Sequence[str], instruments: Sequence[str], by: HoldOut | None) -> tuple[list[int], str]:
    """Return the split of each note, from the notes' names and instruments, and what is held out, with the reason.

    None holds out whole instruments if there are ten and two thirds of the notes stay for training, else notes: few
    instruments cannot be spared, and half of a collection that is never trained on is lost.
    """
    names = sorted(set(instruments))
    by_instrument = dict(zip(names, split_instruments(names), strict=True))
    split = [by_instrument[name] for name in instruments]
    training_share = split.count(0) / max(len(split), 1)
    few = len(names) < _FEW or training_share < _KEPT
    if by == "none":
        return [0] * len(notes), "nothing, as was asked for"
    if by == "instruments" or (by is None and not few):
        held = [list(by_instrument.values()).count(i) for i in (1, 2)]
        if not sum(held):
            return split, "nothing, since there is one instrument"
        return split, f"{held[0]:,} instruments for validation and {held[1]:,} for tests, of {len(names):,}"
    split = split_notes(notes)
    if not sum(split):
        return split, "nothing, since there is one note"
    if by == "notes":
        why = "as was asked for"
    elif len(names) < _FEW:
        why = f"since {len(names):,} instruments are few" if len(names) > 1 else "since there is one instrument"
    else:
        why = "since whole instruments would be more than a third of them"
    return split, f"{sum(split):,} of {len(notes):,} notes for validation, {why}"


def spread(notes: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Return at most `count` of the notes of a split, evenly spaced."""
    return notes[np.linspace(0, len(notes) - 1, min(count, len(notes))).astype(np.int64)]
