"""A folder of anyone's notes: sound files of any kind and rate, labelled by folder and name, or by a CSV."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mars.data import pitch as pitches
from mars.data.decode import SUFFIXES, decode
from mars.data.kinds import not_a_folder
from mars.data.notes import SHORTEST
from mars.data.packed import ALLOW_BAD, CONFIDENCE, Dataset, Writer
from mars.data.splits import HoldOut
from mars.errors import BadFileError, DataError
from mars.labels import LABELS, UNKNOWN, Labels, is_name, label, labels_of, pitch_of

RESERVED = ("split", CONFIDENCE)  # columns of a dataset that are no labels
Pitch = Literal["named", "estimate"]

_BETWEEN = re.compile(r"[-_ .]")  # the parts of a file's name
_NOTE = re.compile(r"[A-G][#♯b♭]?-?\d")  # a part that names a pitch; written small it is as often a number of takes


def pack_folder(
    folder: str | Path,
    out: str | Path,
    *,
    csv: str | Path | None = None,
    sample_rate: int = 16_000,
    seconds: float = 4.0,
    shortest: float = SHORTEST,
    pitch: Pitch = "named",
    licence: str = "unknown",
    hold_out: HoldOut | None = None,
    allow_bad: float = ALLOW_BAD,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Pack every audio file below `folder`, cut or padded to `seconds` at `sample_rate` Hz, at `out`.

    Hidden files are left alone, links to folders are not followed. `hold_out`: see `mars.data.splits.hold_out`.
    Labels come from names like NSynth's (bass_electronic_018-060-075.wav), and from `csv` where it lists the
    file. Without either, the instrument is the file's folder, or its name up to the first separator, and the pitch is
    what one part of its name says: 60 in violin_C4_soft.wav.

    pitch: "estimate" takes it from the sound where it is not said (`mars.data.pitch`); sounds without one get none.

    Raises `DataError` (also for a bad row of the CSV), `TooManyBadError` and `DiskError`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(not_a_folder(folder, "give the folder that holds the audio files"))
    rows = read_csv(Path(csv)) if csv else {}
    listing = find(folder)
    files = listing.files
    if not files:
        raise DataError(f"{folder} holds no audio files{listing.why_none()}; want {', '.join(SUFFIXES)}")
    origin = {"kind": "folder", "folder": folder.absolute().name, "licence": licence}
    samples = round(seconds * sample_rate)
    with Writer(
        out, sample_rate=sample_rate, samples=samples, origin=origin, expected=len(files), progress=progress
    ) as writer:
        writer.ignored = dict(listing.ignored)
        writer.confidence = {} if pitch == "estimate" else None
        for name, reason in listing.refused.items():
            writer.bad(name, reason)
        for file in files:
            name = file.relative_to(folder).as_posix()
            try:
                if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
                    raise BadFileError("not a regular file inside the folder")
                sound = decode(file, sample_rate=sample_rate, samples=samples, shortest=shortest)
            except (BadFileError, OSError) as error:
                writer.bad(name, str(error))
                continue
            labels = _labels(file, folder, rows.get(name, {}))
            if writer.confidence is not None and labels.pitch == UNKNOWN and np.isfinite(sound.audio).all():
                number, sure = pitches.estimate(sound.audio, sample_rate)
                labels = replace(labels, pitch=number)
                if number != UNKNOWN:
                    writer.confidence[name] = sure
            writer.add(name, sound.audio, labels, changes=sound.changes)
        for name in rows.keys() - {file.relative_to(folder).as_posix() for file in files}:
            writer.bad(name, "listed in the CSV, but there is no such file")
        return writer.commit(allow_bad, hold_out)


@dataclass(slots=True)
class FolderListing:
    """What a folder holds, its sub-folders included."""

    files: list[Path] = field(default_factory=list)  # with a suffix of sound files, sorted
    refused: dict[str, str] = field(default_factory=dict)  # folders that were not looked into, and why
    ignored: Counter[str] = field(default_factory=Counter)  # other files: how many hidden ones, how many per suffix

    def why_none(self) -> str:
        """Return the part of an error message that says why there are no sound files."""
        return "".join(f" ({name}: {reason})" for name, reason in list(self.refused.items())[:1])


def find(folder: Path) -> FolderListing:
    """List the sound files below a folder. Raises `DataError` where the folder itself cannot be read."""
    listing = FolderListing()

    def refuse(error: OSError) -> None:
        path = Path(error.filename)
        if path == folder:
            raise DataError(f"{folder} cannot be read ({error.strerror}); change its permissions")
        listing.refused[path.relative_to(folder).as_posix()] = f"a folder that cannot be read ({error.strerror})"

    for parent, folders, files in os.walk(folder, onerror=refuse):  # follows no links
        for names in (folders, files):  # what macOS adds to a file is hidden too: ._name
            hidden = [name for name in names if name.startswith(".")]
            listing.ignored["hidden"] += len(hidden)
            names[:] = sorted(name for name in names if not name.startswith("."))
        for name in folders + files:
            path = Path(parent, name)
            if name.lower().endswith(SUFFIXES):
                listing.files.append(path)
            elif name in files:
                listing.ignored[path.suffix.lower() or "no suffix"] += 1
            elif path.is_symlink():
                listing.refused[path.relative_to(folder).as_posix()] = "a link to a folder, which is not followed"
    listing.ignored = +listing.ignored
    listing.files.sort()
    return listing


def _labels(file: Path, folder: Path, row: dict[str, str | int]) -> Labels:
    inside, parts = file.parent.relative_to(folder).as_posix(), _BETWEEN.split(file.stem)
    known = labels_of(file.stem) or Labels(parts[0] or file.stem if inside == "." else inside, pitch=_named(parts))
    said: dict[str, Any] = {name: row.get(name, getattr(known, name)) for name in LABELS}
    own = {name: str(word) for name, word in row.items() if name not in LABELS}
    return Labels(**said, own=own)


def _named(parts: list[str]) -> int:
    """The pitch that just one of the parts of a file's name is the name of."""
    found = [part for part in parts if _NOTE.fullmatch(part)]
    try:
        return pitch_of(found[0]) if len(found) == 1 else UNKNOWN
    except ValueError:  # G#9 and higher
        return UNKNOWN


def read_csv(file: Path) -> dict[str, dict[str, str | int]]:
    """Read the labels of each file that a CSV lists; empty cells are left out.

    Columns: file, any of the labels (`mars.labels`), and others, which are labels of their own.
    Raises `DataError` naming the line for whatever is wrong.
    """
    rows: dict[str, dict[str, str | int]] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = reader.fieldnames or []
            if "file" not in columns or len(set(columns)) < len(columns):
                raise DataError(
                    f"{file}: want the column file and any of {', '.join(LABELS)}, or labels of your own; "
                    f"got {', '.join(columns)}"
                )
            if wrong := [name for name in columns if not is_name(name) or name in RESERVED]:
                raise DataError(
                    f"{file}: the column {wrong[0]!r:.80} cannot be a label; name it with letters, digits, spaces, "
                    f"- and _, and not {', '.join(RESERVED)}"
                )
            for row in reader:
                where = f"{file}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: want {len(columns)} cells; quote commas inside a cell")
                name = Path(row["file"]).as_posix()
                if not row["file"] or name in rows:
                    raise DataError(f"{where}: file {row['file']!r} is empty or listed twice; remove the line")
                cells = {key: cell.strip() for key, cell in row.items() if key != "file" and cell.strip()}
                rows[name] = {key: _cell(key, cell, where) for key, cell in cells.items()}
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as CSV in UTF-8 ({error}); save it again") from None
    return rows


def _cell(key: str, cell: str, where: str) -> str | int:
    try:
        return label(key).read(cell)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
