"""Packed datasets: one directory with every note as int16, its labels and a manifest of checksums.

A dataset appears under its name complete or not at all. Its files:
  audio.i16         (N, samples) little-endian int16, memory-mapped when read
  metadata.npy      (N, 6) int32, columns as in COLUMNS, -1 = unknown
  names.txt, instruments.txt   one name a line
  dataset.json      format, version, sample_rate (Hz), samples, count, origin, splits, bad
  bad_files.jsonl   {"file", "reason"} a line: what was left out
  manifest.json     size in bytes and sha256 of every other file
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError  # numpy takes headers apart as Python
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mars.config import FAMILIES, SOURCES
from mars.data.notes import Audio, Labels, fault
from mars.errors import DataError, DiskError, TooManyBadError
from mars.files import read_bytes, read_json, read_text, sha256, sync

if TYPE_CHECKING:
    import torch

COLUMNS = ("instrument", "family", "source", "pitch", "velocity", "split")
SPLITS = ("train", "valid", "test")
FORMAT, VERSION = "mars-dataset", 1
ALLOW_BAD = 0.01  # of the files; more points at a wrong folder or a broken download

_FILES = ("audio.i16", "metadata.npy", "names.txt", "instruments.txt", "dataset.json", "bad_files.jsonl")
_LARGEST_JSON = 1 << 24  # bytes
_LARGEST_NAME = 1 << 14  # bytes; what the paths of a file system may have, at most four bytes a letter
_LIMITS = (None, len(FAMILIES), len(SOURCES), 128, 128, len(SPLITS))  # of COLUMNS; exclusive

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Notes with their labels, on disk or in memory."""

    audio: npt.NDArray[np.int16]  # (N, samples); 32768 is full scale
    metadata: npt.NDArray[np.int32]  # (N, 6), columns as in COLUMNS
    names: list[str]
    instruments: list[str]
    sample_rate: int  # Hz
    fingerprint: str  # sha256 of the content, in hex
    origin: dict[str, Any]  # where the notes came from

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Dataset:
        """The dataset at `path`; `verify` also checks every sha256.

        Raises `DataError` for anything but a complete dataset of a version this code knows.
        """
        path = Path(path)
        if not (path / "dataset.json").is_file():
            if not path.exists():
                raise DataError(f"{path} does not exist; pack notes first: mars-data folder PATH --out {path}")
            raise DataError(
                f"{path} is not a packed dataset (no dataset.json); pack it first: mars-data folder {path} --out DIR"
            )
        again = "pack it again"
        info = _read_json(path / "dataset.json")
        if info.get("format") != FORMAT or info.get("version") != VERSION:
            raise DataError(
                f"{path}: want format {FORMAT} version {VERSION}, got {info.get('format')} version "
                f"{info.get('version')}; {again} with this version of mars"
            )
        _check_manifest(path, verify)
        try:
            count, samples, rate = (int(info[key]) for key in ("count", "samples", "sample_rate"))
            origin = dict(info["origin"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from None
        bytes_wanted = count * samples * 2
        if min(count, samples, rate) < 1 or (path / "audio.i16").stat().st_size != bytes_wanted:
            raise DataError(f"{path}/audio.i16: want {count} x {samples} int16, got another size; {again}")
        metadata = _metadata(path / "metadata.npy", count)
        names, instruments = (
            read_text(path / f"{file}.txt", DataError, _LARGEST_NAME * count).splitlines()
            for file in ("names", "instruments")
        )
        if len(names) != count:
            raise DataError(f"{path}: names.txt and metadata.npy do not describe {count} notes; {again}")
        for column, limit, values in zip(COLUMNS, _LIMITS, metadata.T, strict=True):
            least = 0 if column in ("instrument", "split") else -1
            if values.min() < least or values.max() >= (limit or len(instruments)):
                raise DataError(f"{path}/metadata.npy: a {column} is out of range; {again}")
        audio = np.memmap(path / "audio.i16", np.dtype("<i2"), "r", shape=(count, samples))
        fingerprint = sha256(path / "manifest.json")
        return cls(audio, metadata, names, instruments, rate, fingerprint, origin)

    @property
    def samples(self) -> int:
        """Samples per note."""
        return int(self.audio.shape[1])

    def __len__(self) -> int:
        return len(self.audio)

    def column(self, name: str) -> npt.NDArray[np.int32]:
        """One of COLUMNS for every note, (N,); -1 = unknown. Raises `DataError` for another name."""
        if name not in COLUMNS:
            raise DataError(f"want one of the columns {', '.join(COLUMNS)}; got {name!r}")
        return self.metadata[:, COLUMNS.index(name)]

    def split(self, name: Literal["train", "valid", "test"]) -> npt.NDArray[np.int64]:
        """Indices of the notes of one split.

        A dataset of one instrument has no valid notes, for splits never share an instrument: its valid
        split is its train split, so a loss can still be watched, and the packing warned of it.
        """
        if name not in SPLITS:
            raise DataError(f"want one of the splits {', '.join(SPLITS)}; got {name!r}")
        found = np.flatnonzero(self.column("split") == SPLITS.index(name))
        return self.split("train") if name == "valid" and not len(found) else found

    def waveforms(self, indices: npt.ArrayLike) -> torch.Tensor:
        """Waveforms (B, samples), float32 in [-1, 1), of the notes at `indices` (B,)."""
        import torch

        return torch.from_numpy(self.audio[np.asarray(indices, np.int64)].astype(np.float32)) / 32768


def open_dataset(path: str | Path | None) -> Dataset:
    """The packed dataset at `path`, or the built-in notes for None. Raises `DataError`."""
    if path is None:
        from mars.data import builtin

        return builtin.load()
    return Dataset.open(path)


def split_instruments(names: Sequence[str], valid: float = 0.1, test: float = 0.1) -> list[int]:
    """The split of each instrument, an index into SPLITS, decided by the sha256 of its name alone.

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


class Writer:
    """Writes one packed dataset; nothing appears at `out` before `commit`, nothing is left without it.

    Use as a context manager. Raises `DataError` where `out` exists, `DiskError` where there is no room.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        sample_rate: int,
        samples: int,
        origin: dict[str, Any],
        expected: int = 0,  # notes, as far as known: for the check of free space and for progress
        progress: Callable[[int, int], None] | None = None,  # called with notes seen and expected
    ) -> None:
        self.out, self.sample_rate, self.samples, self.origin = Path(out), sample_rate, samples, origin
        self.expected, self._progress = expected, progress
        self._rows: dict[str, tuple[int, Labels, int]] = {}  # name -> place in the audio file, labels, split
        self._written = 0
        self._bad: dict[str, str] = {}

    def __enter__(self) -> Writer:
        # os.path: a dangling link is in the way as well
        if os.path.lexists(self.out):
            raise DataError(f"{self.out} exists; give --out a new folder or remove it first")
        parent = self.out.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        need = self.expected * (self.samples * 2 + 256) + (1 << 20)
        if (free := shutil.disk_usage(parent).free) < need:
            raise DiskError(
                errno.ENOSPC,
                f"{need:,} bytes wanted for {self.expected:,} notes, {free:,} free; make room",
                str(parent),
            )
        self._temp = parent / f".tmp-{self.out.name}-{os.getpid()}"
        self._temp.mkdir()
        self._audio = (self._temp / "audio.i16").open("w+b", buffering=1 << 20)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk also fails the last flush
            self._audio.close()
        shutil.rmtree(self._temp, ignore_errors=True)

    def add(self, name: str, audio: Audio, labels: Labels, split: int = -1) -> bool:
        """One note, (samples,) float; split -1 lets the instrument decide. False if it was bad."""
        if audio.shape != (self.samples,):
            raise ValueError(f"{name}: want audio of shape ({self.samples},), got {audio.shape}; use notes.fit")
        twice = name in self._rows or name in self._bad
        reason = "a note of this name came before" if twice else fault(audio)
        if reason is None and not name.isprintable():
            reason = "its name has characters that cannot be written on a line"
        if reason is not None:
            self.bad(name, reason)
            return False
        self._audio.write(np.clip(np.rint(audio * 32768.0), -32768, 32767).astype("<i2").tobytes())
        self._rows[name] = (self._written, labels, split)
        self._written += 1
        self._tell()
        return True

    def bad(self, file: str, reason: str) -> None:
        """Leaves a file out and says why; one that was added before is taken back."""
        self._rows.pop(file, None)
        self._bad.setdefault(file, reason)
        self._tell()

    def relabel(self, name: str, labels: Labels) -> None:
        """Other labels for a note that was added."""
        place, _, split = self._rows[name]
        self._rows[name] = (place, labels, split)

    def names(self) -> list[str]:
        """The notes added so far."""
        return list(self._rows)

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._written + len(self._bad), self.expected)

    def commit(self, allow_bad: float = ALLOW_BAD) -> Dataset:
        """Puts the dataset at its place and opens it.

        Raises `TooManyBadError` where more than `allow_bad` of the files are bad (their list is then kept
        beside `out`), `DataError` where no note is left.
        """
        bad = "".join(json.dumps({"file": file, "reason": reason}) + "\n" for file, reason in self._bad.items())
        seen = len(self._rows) + len(self._bad)
        if len(self._bad) > allow_bad * seen:
            listing = self.out.with_name(self.out.name + ".bad_files.jsonl")
            listing.write_text(bad, "utf-8")
            first = next(iter(self._bad.items()))
            raise TooManyBadError(
                f"{len(self._bad):,} of {seen:,} files are bad, over {allow_bad:.1%}; the first: "
                f"{first[0]}: {first[1]}; all are in {listing}; mend them or pass --allow-bad FRACTION"
            )
        if not self._rows:
            raise DataError(f"there is no note for {self.out}; check the path of the source")
        rows = list(self._rows.values())
        self._compact([place for place, _, _ in rows])
        instruments = sorted({labels.instrument for _, labels, _ in rows})
        index = {name: i for i, name in enumerate(instruments)}
        splits = split_instruments(instruments)
        if len(instruments) == 1 and all(split < 0 for *_, split in rows):
            splits = [0]
            log.warning("all notes are of one instrument: all go to train, and valid is the same as train")
        table = []
        for _, labels, split in rows:
            i = index[labels.instrument]
            known = (labels.family, labels.source, labels.pitch, labels.velocity)
            table.append((i, *known, splits[i] if split < 0 else split))
        metadata = np.array(table, np.int32)
        info = {
            "format": FORMAT, "version": VERSION, "sample_rate": self.sample_rate, "samples": self.samples,
            "count": len(rows), "origin": self.origin,
            "splits": {name: int((metadata[:, -1] == i).sum()) for i, name in enumerate(SPLITS)},
            "bad": len(self._bad),
        }  # fmt: skip
        buffer = io.BytesIO()
        np.save(buffer, metadata, allow_pickle=False)
        self._put("metadata.npy", buffer.getvalue())
        self._put("names.txt", _lines(self._rows))
        self._put("instruments.txt", _lines(instruments))
        self._put("dataset.json", json.dumps(info, indent=1).encode())
        self._put("bad_files.jsonl", bad.encode())
        manifest = {name: _digest(self._temp / name) for name in _FILES}
        self._put("manifest.json", json.dumps({"files": manifest}, indent=1).encode())
        sync(self._temp)
        self._temp.rename(self.out)
        sync(self.out.absolute().parent)
        return Dataset.open(self.out)

    def _compact(self, places: list[int]) -> None:
        """Closes the gaps that notes taken back have left, and makes the audio safe on the disk."""
        self._audio.flush()
        if len(places) < self._written:
            audio = np.memmap(self._audio, np.dtype("<i2"), "r+", shape=(self._written, self.samples))
            for to, place in enumerate(places):  # ascending, so no note is overwritten before it is moved
                if to != place:
                    audio[to] = audio[place]
            audio.flush()
            del audio
            self._audio.truncate(len(places) * self.samples * 2)
        os.fsync(self._audio.fileno())
        self._audio.close()

    def _put(self, name: str, content: bytes) -> None:
        with (self._temp / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _lines(names: Iterable[str]) -> bytes:
    return "".join(name + "\n" for name in names).encode()


def _digest(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _metadata(path: Path, count: int) -> npt.NDArray[np.int32]:
    """The table of `count` notes, whose header is held against that before anything is made of it."""
    content = io.BytesIO(read_bytes(path, DataError, count * len(COLUMNS) * 4 + 4096))
    try:
        if np.lib.format.read_magic(content) != (1, 0):
            raise ValueError("another version of the format")
        shape, transposed, dtype = np.lib.format.read_array_header_1_0(content)
    except (ValueError, TypeError, KeyError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        raise DataError(
            f"{path} is damaged: no table of numpy ({' '.join(str(error).split()):.200}); pack it again"
        ) from None
    values = content.read()
    if (shape, transposed, dtype) != ((count, len(COLUMNS)), False, np.dtype("<i4")) or len(values) != count * len(
        COLUMNS
    ) * 4:
        raise DataError(f"{path} is damaged: it does not describe {count:,} notes; pack it again")
    return np.frombuffer(values, dtype).reshape(shape).copy()  # which may be written to


def _read_json(path: Path) -> dict[str, Any]:
    content = read_json(path, DataError, _LARGEST_JSON)
    if not isinstance(content, dict):
        raise DataError(f"{path}: want a JSON object, got {type(content).__name__}; pack the dataset again")
    return content


def _check_manifest(path: Path, verify: bool) -> None:
    files = _read_json(path / "manifest.json").get("files")
    if not isinstance(files, dict) or set(files) != set(_FILES):
        raise DataError(f"{path}/manifest.json does not list the dataset's files; pack the dataset again")
    for name, want in files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        listed = want.get("size") if isinstance(want, dict) else None
        if size is None or size != listed:
            raise DataError(f"{file}: want {listed} bytes, got {size or 'none'}; pack the dataset again")
        if verify and _digest(file) != want:
            raise DataError(f"{file} differs from its checksum; pack the dataset again")
