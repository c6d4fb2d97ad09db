"""What every source of notes shares: names, audio of one length, the check of a note, JSON from strangers."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mars import files
from mars.config import FAMILIES, SOURCES
from mars.errors import DataError

Audio = npt.NDArray[np.float32]  # (samples,), 1.0 is full scale

UNKNOWN = -1  # a label that nobody gave
SILENT = 1e-4  # a note whose peak stays below this is taken for silence
SHORTEST = 0.1  # s; shorter files are taken for rubbish
_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # they would reorder what follows
_NAME = re.compile(rf"({'|'.join(FAMILIES)})_({'|'.join(SOURCES)})_(\d{{3}})-(\d{{3}})-(\d{{3}})")


@dataclass(frozen=True, slots=True)
class Labels:
    """What is known of a note besides its sound; `UNKNOWN` where nobody said."""

    instrument: str
    family: int = UNKNOWN  # index into FAMILIES
    source: int = UNKNOWN  # index into SOURCES
    pitch: int = UNKNOWN  # MIDI, 0..127
    velocity: int = UNKNOWN  # MIDI, 0..127


def labels_of(name: str) -> Labels | None:
    """The labels that an NSynth name like `bass_electronic_018-060-075` states; None for any other name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    family, source, number, pitch, velocity = match.groups()
    if int(pitch) > 127 or int(velocity) > 127:
        return None
    return Labels(
        f"{family}_{source}_{number}",
        FAMILIES.index(family),
        SOURCES.index(source),
        int(pitch),
        int(velocity),
    )


def one_line(name: str) -> bool:
    """Whether a name can stand on a line of text: any Unicode but controls, ends of lines and turns of direction."""
    return not any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in _TURNS for c in name
    )


def fit(audio: Audio, samples: int) -> Audio:
    """Audio of any length, cut or padded with zeros at its end to (samples,)."""
    cut = audio[:samples].astype(np.float32, copy=False)
    return np.pad(cut, (0, samples - len(cut)))


def fault(audio: Audio) -> str | None:
    """Why this audio is no note, or None if it is one."""
    if not np.isfinite(audio).all():
        return "holds NaN or infinite samples"
    peak = float(np.abs(audio).max(initial=0.0))
    return f"silent (peak {peak:.1e})" if peak < SILENT else None


def parse_json(text: bytes | str, where: str) -> Any:
    """Strict JSON, see `mars.files.parse_json`. Raises `DataError` naming `where`."""
    return files.parse_json(text, where, DataError)
