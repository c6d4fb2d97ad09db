"""Packed datasets: one directory with every note as int16, its labels and a manifest of checksums.

A dataset appears under its name complete or not at all. Its files:
  audio.i16         (N, samples) little-endian int16, of which no more is read than the notes asked for
  metadata.npy      (N, columns) int32, -1 = unknown
  names.txt, instruments.txt   one name a line
  dataset.json      format, version, sample_rate (Hz), samples, count, origin, splits, bad, columns (the names of those
                    of metadata.npy; COLUMNS where it says nothing), words (of the labels that have some of the
                    dataset's own, by name: what the numbers of their columns stand for), and how they were packed:
                    changes (notes by what was done to them), ignored (files by suffix), held_out (what, and why)
  bad_files.jsonl   {"file", "reason"} a line: what was left out
  manifest.json     size in bytes and sha256 of every other file
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from mars import lock
from mars.data.kinds import not_a_folder
from mars.data.notes import Audio, fault
from mars.data.splits import SPLITS, HoldOut, hold_out
from mars.errors import DataError, DiskError, TooManyBadError
from mars.files import opened, parse_json, read_bytes, read_json, read_text, sha256, sync
from mars.labels import CLOSED, LABELS, LONGEST_WORD, UNKNOWN, Labels, Values, Words, is_name, label
from mars.text import is_one_line

if TYPE_CHECKING:
    import torch

COLUMNS = ("instrument", *CLOSED, "split")
CONFIDENCE = "pitch_confidence"  # column: of an estimated pitch, in percent; -1 where somebody has said it
FORMAT, VERSION = "mars-dataset", 1
ALLOW_BAD = 0.01  # of the files; more points at a wrong folder or a broken download

_FILES = ("audio.i16", "metadata.npy", "names.txt", "instruments.txt", "dataset.json", "bad_files.jsonl")
_LARGEST_JSON = 1 << 24  # bytes
_BLOCK = 1 << 24  # bytes that are hashed at a time
_NPY = b"\x93NUMPY\x01\x00"  # how a .npy file begins, version 1.0; the length of its header follows
_SHAPE = re.compile(rb"\{'descr': '<i4', 'fortran_order': False, 'shape': \((\d+), (\d+)\), \} *\n")
_LARGEST_NAME = 1 << 14  # bytes; what the paths of a file system may have, at most four bytes a letter
_MOST_COLUMNS = 256


@dataclass(frozen=True, slots=True)
class Packing:
    """How notes were packed, as far as the dataset says."""

    changes: Mapping[str, int] = field(default_factory=dict)  # notes by what was done to them, see `decode.CHANGES`
    ignored: Mapping[str, int] = field(default_factory=dict)  # files that nobody tried to read, by suffix
    held_out: str = ""  # what is kept from training, and why

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Packing:
        """Read it from a dataset.json. Raises `TypeError` or `ValueError` if a value is malformed."""
        changes, ignored = (
            {str(key): int(count) for key, count in info.get(name, {}).items()} for name in ("changes", "ignored")
        )
        return cls(changes, ignored, str(info.get("held_out", "")))


class AudioFile:
    """The audio of a packed dataset, (N, samples) int16, indexed like an array and read when it is indexed.

    It is not mapped into memory: a file that is cut short while it is in use would end the process with a signal, and
    one that is written to would give other notes without a word. Here both are a `DataError`.
    """

    dtype = np.dtype("<i2")
    ndim = 2

    def __init__(self, path: Path, count: int, samples: int, sha256: str) -> None:
        self.path, self.shape, self.sha256 = path, (count, samples), sha256
        self._places = np.arange(count)
        self._stamp = count * samples * self.dtype.itemsize, path.stat().st_mtime_ns

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> npt.NDArray[np.int16]:
        """Return int16 as an array would: notes by any NumPy index, and of them samples by numbers or slices.

        Raises:
            DataError: the file is not the one that was opened any more, or cannot be read.
        """
        rows, *columns = key if isinstance(key, tuple) else (key,)
        places = self._places[rows]
        notes = np.empty((*places.shape, self.shape[1]), self.dtype)
        with self._unchanged() as file:
            for place, note in zip(places.flat, notes.reshape(-1, self.shape[1]), strict=True):
                file.seek(int(place) * note.nbytes)
                file.readinto(note)  # type: ignore[attr-defined]
        return notes[(*(slice(None) for _ in places.shape), *columns)]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self[:].astype(dtype or self.dtype, copy=False)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compare the whole file with its sha256; `progress` is called with the bytes done and the total.

        Raises:
            DataError: it differs, has changed since it was opened, or cannot be read.
        """
        digest, done, size = hashlib.sha256(), 0, self._stamp[0]
        with self._unchanged() as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                done += len(block)
                if progress is not None:
                    progress(done, size)
        if digest.hexdigest() != self.sha256:
            raise DataError(
                f"{self.path} differs from its checksum; put back the file that was packed, or pack it again"
            )

    @contextmanager
    def _unchanged(self) -> Iterator[BinaryIO]:
        """The open file, which when the block ends must still be as it was when the dataset was opened."""
        try:
            with self.path.open("rb") as file:
                yield file
                now = _stamp(os.fstat(file.fileno()))
        except OSError as error:
            raise DataError(f"{self.path} cannot be read any more ({error.strerror or error}); start again") from None
        if now != self._stamp:
            sizes = f"it had {self._stamp[0]:,} bytes, it has {now[0]:,}" if now[0] != self._stamp[0] else "written to"
            raise DataError(
                f"{self.path} has changed since it was opened ({sizes}); "
                "put back the file that was packed, or pack it again, and start again"
            )


def _stamp(status: os.stat_result) -> tuple[int, int]:
    """Return the size in bytes and the time of the last change, which tell whether a file has been written to."""
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True, eq=False)
class Dataset:
    """Notes with their labels, on disk or in memory."""

    audio: npt.NDArray[np.int16] | AudioFile  # (N, samples); 32768 is full scale
    metadata: npt.NDArray[np.int32]  # (N, columns)
    names: list[str]
    instruments: list[str]
    sample_rate: int  # Hz
    fingerprint: str  # sha256 of the content, in hex
    origin: dict[str, Any]  # where the notes came from
    packing: Packing = field(default_factory=Packing)
    columns: tuple[str, ...] = COLUMNS  # of the metadata; also such as this version of mars does not know
    own_words: Words = field(default_factory=dict)  # of labels, by name; see `words`

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Dataset:
        """Return the dataset at `path`, every file but the audio checked by its sha256; `verify` checks that too.

        Raises `DataError` for anything but a complete dataset of a version this code knows.
        """
        try:
            return cls._open(Path(path), verify)
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror or error}); check the path and its rights"
            ) from None

    @classmethod
    def _open(cls, path: Path, verify: bool) -> Dataset:
        if not (path / "dataset.json").is_file():
            if path.is_file():
                raise DataError(not_a_folder(path, "give the folder that mars-data wrote"))
            if not path.exists():
                raise DataError(f"{path} does not exist; pack notes into it first: `mars-data folder`")
            raise DataError(f"{path} is not a packed dataset (no dataset.json); pack it first: `mars-data folder`")
        again = "pack it again"
        info = _read_json(path / "dataset.json")
        if info.get("format") != FORMAT or info.get("version") != VERSION:
            raise DataError(
                f"{path}: want format {FORMAT} version {VERSION}, got {info.get('format')} version "
                f"{info.get('version')}; {again} with this version of mars"
            )
        sums = _check_manifest(path)
        try:
            count, samples, rate = (int(info[key]) for key in ("count", "samples", "sample_rate"))
            origin, packing = dict(info["origin"]), Packing.of(info)
            bytes_wanted = count * samples * 2
            if min(count, samples, rate) < 1 or (path / "audio.i16").stat().st_size != bytes_wanted:
                raise DataError(f"{path}/audio.i16: want {count} x {samples} int16, got another size; {again}")
            columns = _columns(info.get("columns", COLUMNS), path / "dataset.json")
            own = _own_words(info.get("words", {}), columns, path / "dataset.json")
            metadata = _read_metadata(path / "metadata.npy", count, len(columns))
            names, instruments = (
                read_text(path / f"{file}.txt", DataError, _LARGEST_NAME * count).splitlines()
                for file in ("names", "instruments")
            )
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
            raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from None
        if len(names) != count:
            raise DataError(f"{path}/names.txt: want {count} names, got {len(names)}; {again}")
        words = {"instrument": instruments, **own}
        limits = {name: len(label(name).values(words)) for name in (*LABELS, *own)}
        limits["split"] = len(SPLITS)
        for column, values in zip(columns, metadata.T, strict=True):
            least = 0 if column in ("instrument", "split") else UNKNOWN
            if values.min() < least or values.max() >= limits.get(column, 1 << 31):
                raise DataError(f"{path}/metadata.npy: a {column} is out of range; {again}")
        audio = AudioFile(path / "audio.i16", count, samples, sums["audio.i16"])
        fingerprint = sha256(path / "manifest.json")
        dataset = cls(audio, metadata, names, instruments, rate, fingerprint, origin, packing, columns, own)
        if verify:
            dataset.verify()
        return dataset

    @property
    def samples(self) -> int:
        """Samples per note."""
        return int(self.audio.shape[1])

    def __len__(self) -> int:
        return len(self.audio)

    def column(self, name: str) -> npt.NDArray[np.int32]:
        """Return a label, or the split, of every note, (N,); -1: unknown, or the dataset was packed without it.

        Raises `DataError` for another name.
        """
        if name in self.columns:
            return self.metadata[:, self.columns.index(name)]
        if name not in LABELS:
            raise DataError(f"want one of the columns {', '.join(self.columns)}; got {name!r}")
        return np.full(len(self), UNKNOWN, np.int32)

    @property
    def words(self) -> dict[str, list[str]]:
        """The words of the labels that have none of their own, or more than these; see `mars.labels`."""
        return {"instrument": self.instruments, **{name: list(words) for name, words in self.own_words.items()}}

    @property
    def own(self) -> tuple[str, ...]:
        """The names of its labels that are not in `mars.labels.LABELS`."""
        return tuple(name for name in self.own_words if name not in LABELS)

    def labels(self, rows: npt.NDArray[np.int64] | None = None) -> dict[str, npt.NDArray[np.int32]]:
        """The numbers of every label, by its name, of the notes at these places (None: all)."""
        return {name: self.column(name)[slice(None) if rows is None else rows] for name in (*LABELS, *self.own)}

    def known(self, note: int) -> Values:
        """The values of the labels of a note, as far as they are known."""
        numbers, words = {name: int(self.column(name)[note]) for name in (*LABELS, *self.own)}, self.words
        return {name: label(name).values(words)[i] for name, i in numbers.items() if i != UNKNOWN}

    def split(self, name: Literal["train", "valid", "test"]) -> npt.NDArray[np.int64]:
        """Return indices of the notes of one split; none where nothing was held out for it."""
        if name not in SPLITS:
            raise DataError(f"want one of the splits {', '.join(SPLITS)}; got {name!r}")
        return np.flatnonzero(self.column("split") == SPLITS.index(name))

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Check that the audio on the disk is what was packed, which takes about a second for each gigabyte.

        `progress` is called with the bytes done and the total. Raises `DataError`.
        """
        if isinstance(self.audio, AudioFile):
            self.audio.verify(progress)

    def waveforms(self, indices: npt.ArrayLike) -> torch.Tensor:
        """Return waveforms (B, samples), float32 in [-1, 1), of the notes at `indices` (B,).

        Raises `DataError` where the audio on the disk has changed since the dataset was opened.
        """
        import torch

        return torch.from_numpy(self.audio[np.asarray(indices, np.int64)].astype(np.float32)) / 32768


def left_out(path: Path) -> Counter[str]:
    """Count the files that the packing of the dataset at `path` left out, by kind of reason. Raises `DataError`."""
    listing, reasons = path / "bad_files.jsonl", []
    for line in read_bytes(listing, DataError).splitlines():
        entry = parse_json(line, str(listing), DataError)
        if not isinstance(entry, dict) or not isinstance(entry.get("reason"), str):
            raise DataError(f"{listing}: want a reason on every line; pack the dataset again")
        reasons.append(entry["reason"])
    return _kinds(reasons)


def _kinds(reasons: Iterable[str]) -> Counter[str]:
    """Count the reasons of each kind, which is the part of their text before the details."""
    return Counter(re.split(r" \(|:", reason)[0] for reason in reasons)


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
        self.ignored: dict[str, int] = {}  # files that nobody tried to read, by suffix
        self._changes: dict[str, frozenset[str]] = {}  # name -> what was done to its sound
        self.confidence: dict[str, float] | None = None  # name -> of its pitch, where pitches are estimated
        self._bad: dict[str, str] = {}

    def __enter__(self) -> Writer:
        out = self.out.absolute()
        parent = out.parent
        lock.sweep(parent)
        # os.path: a dangling link is in the way as well
        if os.path.lexists(out):
            raise DataError(f"{self.out} exists; name a new folder or remove it first")
        with self._writing():
            parent.mkdir(parents=True, exist_ok=True)
        need = self.expected * (self.samples * 2 + 256) + (1 << 20)
        if (free := shutil.disk_usage(parent).free) < need:
            raise DiskError(f"{parent}: {need:,} bytes wanted for {self.expected:,} notes, {free:,} free; make room")
        with self._writing(), contextlib.ExitStack() as stack:
            self._temp = stack.enter_context(lock.scratch(out))
            self._audio = (self._temp / "audio.i16").open("w+b", buffering=1 << 20)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk also fails the last flush
            self._audio.close()
        self._stack.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise DataError(f"{self.out}: the name is too long; choose a shorter one") from None
            raise DiskError(
                f"{self.out} cannot be written after {self._written:,} notes ({error.strerror or error}); "
                "make room or name another place"
            ) from error

    def add(self, name: str, audio: Audio, labels: Labels, split: int = -1, *, changes: Collection[str] = ()) -> bool:
        """Add a note (samples,) float with what was done to it; split -1: `commit` decides. False if it was bad.

        A sound beyond full scale is made quieter as a whole, so that it fits.
        """
        if audio.shape != (self.samples,):
            raise ValueError(f"{name}: want audio of shape ({self.samples},), got {audio.shape}; use notes.fit")
        reason = fault(audio)
        if reason is not None and "cut" in changes:
            reason += ": in the beginning, which alone is kept"
        if name in self._rows or name in self._bad:
            reason = "a note of this name came before"
        elif reason is None and not all(map(is_one_line, (name, labels.instrument, *labels.own, *labels.own.values()))):
            reason = "its name has characters that cannot be written on a line"
        if reason is not None:
            self.bad(name, reason)
            return False
        if (peak := np.abs(audio).max()) > 1:
            audio, changes = audio / peak, {*changes, "scaled"}
        if changes:
            self._changes[name] = frozenset(changes)
        with self._writing():
            self._audio.write(np.clip(np.rint(audio * 32768.0), -32768, 32767).astype("<i2").tobytes())
        self._rows[name] = (self._written, labels, split)
        self._written += 1
        self._tell()
        return True

    def bad(self, file: str, reason: str) -> None:
        """Leave a file out and record the reason; if it was added before, its note is taken back."""
        self._rows.pop(file, None)
        self._bad.setdefault(file, reason)
        self._tell()

    def relabel(self, name: str, labels: Labels) -> None:
        """Replace the labels of a note that was added."""
        place, _, split = self._rows[name]
        self._rows[name] = (place, labels, split)

    def names(self) -> list[str]:
        """Return the notes added so far."""
        return list(self._rows)

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._written + len(self._bad), self.expected)

    def commit(self, allow_bad: float = ALLOW_BAD, by: HoldOut | None = None) -> Dataset:
        """Move the dataset to its place and open it; `hold_out` decides by `by` which notes are not trained on.

        Raises `TooManyBadError` where more than `allow_bad` of the files are bad (their list is then kept
        beside `out`), `DataError` where no note is left.
        """
        bad = "".join(json.dumps({"file": file, "reason": reason}) + "\n" for file, reason in self._bad.items())
        seen = len(self._rows) + len(self._bad)
        if len(self._bad) > allow_bad * seen:
            listing = self.out.with_name(self.out.name + ".bad_files.jsonl")
            with self._writing():
                listing.write_text(bad, "utf-8")
            first = next(iter(self._bad.items()))
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in _kinds(self._bad.values()).most_common())
            raise TooManyBadError(
                f"{len(self._bad):,} of {seen:,} files are bad, over {allow_bad:.1%} ({kinds}); the first: "
                f"{first[0]}: {first[1]}; all are in {listing}; mend them or allow a larger fraction with `allow_bad`"
            )
        if not self._rows:
            raise DataError(f"there is no note for {self.out}; check the path of the source")
        rows = list(self._rows.values())
        instruments = sorted({labels.instrument for _, labels, _ in rows})
        index = {name: i for i, name in enumerate(instruments)}
        free = [(name, labels.instrument) for name, (_, labels, split) in self._rows.items() if split < 0]
        splits, held_out = hold_out([name for name, _ in free], [instrument for _, instrument in free], by)
        if len(free) < len(rows):
            held_out = "as the source says" + (f"; of the others {held_out}" if free else "")
        decided = iter(splits)
        words, own = _words_of([labels for _, labels, _ in rows])
        places = {name: {word: i for i, word in enumerate(known)} for name, known in words.items()}
        table = [
            (
                index[labels.instrument],
                *(places[name][n] if isinstance(n := getattr(labels, name), str) else n for name in CLOSED),
                next(decided) if split < 0 else split,
                *(places[name].get(labels.own.get(name, ""), UNKNOWN) for name in own),
            )
            for _, labels, split in rows
        ]
        metadata = np.array(table, np.int32)
        columns = (*COLUMNS, *own)
        if self.confidence is not None:
            sure = [round(100 * self.confidence[name]) if name in self.confidence else UNKNOWN for name in self._rows]
            metadata, columns = np.column_stack([metadata, np.array(sure, np.int32)]), (*columns, CONFIDENCE)
        split_of = metadata[:, COLUMNS.index("split")]
        info = {
            "format": FORMAT, "version": VERSION, "sample_rate": self.sample_rate, "samples": self.samples,
            "count": len(rows), "columns": columns, "origin": self.origin,
            "splits": {name: int((split_of == i).sum()) for i, name in enumerate(SPLITS)},
            "bad": len(self._bad), "ignored": self.ignored, "held_out": held_out,
            "changes": Counter(change for name in self._rows for change in self._changes.get(name, ())),
            **({"words": words} if words else {}),
        }  # fmt: skip
        buffer = io.BytesIO()
        np.save(buffer, metadata, allow_pickle=False)
        with self._writing():
            self._compact([place for place, _, _ in rows])
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
        """Close the gaps that notes taken back have left, and flush the audio to the disk."""
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


def _words_of(notes: Iterable[Labels]) -> tuple[dict[str, list[str]], list[str]]:
    """The words of the labels that have some of the notes' own, and the names of those that are not in the table."""
    found: dict[str, set[str]] = {}
    for labels in notes:
        said = {name: getattr(labels, name) for name in CLOSED} | dict(labels.own)
        for name, word in said.items():
            if isinstance(word, str):
                found.setdefault(name, set()).add(word)
    own = sorted(found.keys() - LABELS.keys())
    return {name: [*label(name).words, *sorted(found[name])] for name in (*CLOSED, *own) if name in found}, own


def _lines(names: Iterable[str]) -> bytes:
    return "".join(name + "\n" for name in names).encode()


def _digest(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _columns(names: Any, path: Path) -> tuple[str, ...]:
    """Return the names of the columns in a dataset.json, checked."""
    words: list[Any] = list(names) if isinstance(names, list | tuple) else []
    if not all(isinstance(name, str) and is_one_line(name) for name in words) or not (
        {"instrument", "split"} <= set(words) and len(set(words)) == len(words) <= _MOST_COLUMNS
    ):
        raise DataError(f"{path}: want the names of columns, instrument and split among them; pack the dataset again")
    return tuple(words)


def _own_words(found: Any, columns: Collection[str], path: Path) -> dict[str, list[str]]:
    """The words of labels that a dataset.json holds, checked."""
    good = isinstance(found, dict) and all(
        is_name(name) and name in columns and not label(name).levels and name not in ("instrument", "split")
        and isinstance(words, list) and words[: len(label(name).words)] == list(label(name).words)
        and all(isinstance(word, str) and 0 < len(word) <= LONGEST_WORD and is_one_line(word) for word in words)
        and len(set(words)) == len(words)
        for name, words in found.items()
    )  # fmt: skip
    if not good:
        raise DataError(f"{path}: want different words for columns of labels as words; pack the dataset again")
    return dict(found)


def _read_metadata(path: Path, count: int, columns: int) -> npt.NDArray[np.int32]:
    """Read (count, columns) int32. NumPy's own reader allocates whatever the file claims, and compiles its header."""
    with opened(path) as file:
        start = file.read(len(_NPY) + 2)
        header = file.read(int.from_bytes(start[-2:], "little"))
        content = file.read(count * columns * 4)
    shape = _SHAPE.fullmatch(header)
    right = start.startswith(_NPY) and shape is not None and shape.groups() == (b"%d" % count, b"%d" % columns)
    if not right or len(content) < count * columns * 4:
        raise DataError(f"{path} is damaged: want {count} x {columns} int32; pack the dataset again")
    return np.frombuffer(bytearray(content), np.dtype("<i4")).reshape(count, columns)


def _read_json(path: Path) -> dict[str, Any]:
    content = read_json(path, DataError, _LARGEST_JSON)
    if not isinstance(content, dict):
        raise DataError(f"{path}: want a JSON object, got {type(content).__name__}; pack the dataset again")
    return content


def _check_manifest(path: Path) -> dict[str, str]:
    """Return the listed sha256 of each file, checked against the files; of the audio only the size is checked."""
    files = _read_json(path / "manifest.json").get("files")
    if not isinstance(files, dict) or set(files) != set(_FILES):
        raise DataError(f"{path}/manifest.json does not list the dataset's files; pack the dataset again")
    for name, want in files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        listed = want.get("size") if isinstance(want, dict) else None
        if size is None or size != listed:
            raise DataError(f"{file}: want {listed} bytes, got {size or 'none'}; pack the dataset again")
        if name != "audio.i16" and _digest(file) != want:
            raise DataError(f"{file} differs from its checksum; pack the dataset again")
    return {name: str(want.get("sha256")) for name, want in files.items()}
