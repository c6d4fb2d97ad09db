"""Sets of notes to evaluate: folders of audio files and splits of packed datasets, checked and paired.

Every metric hears the same: mono at 16 kHz, to which others are resampled, exactly 64,000 samples, longer notes cut
and shorter ones padded with zeros, clipped to [-1, 1]. Nothing is left out in silence: a set counts what it changed and
lists what it refused.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mars.data import SPLITS, open_dataset
from mars.data.decode import SUFFIXES, Recording, Sound, convert, record
from mars.data.folder import find
from mars.data.kinds import not_a_folder
from mars.data.notes import SHORTEST, Audio, fault
from mars.errors import BadFileError, DataError, TooManyBadError
from mars.files import read_json, read_limited
from mars.labels import UNKNOWN, Values, is_name, label, labels_of
from mars.runtime import stream

SAMPLE_RATE, SAMPLES = 16_000, 64_000  # Hz; per note
LARGEST = 1 << 30  # bytes of a file of sound, of which a note has no more than 64,000 samples
BATCH = 32  # notes that a transform gets at once
STREAM = 5  # tells the random order from other streams with the same seed


@dataclass(frozen=True)
class Record:
    """What opening a set gave: the names of notes that it changed, and what it left out."""

    resampled: frozenset[str] = frozenset()  # at another rate than 16 kHz
    padded: frozenset[str] = frozenset()  # shorter than 64,000 samples
    cut: frozenset[str] = frozenset()  # longer
    clipped: frozenset[str] = frozenset()  # beyond full scale
    refused: tuple[tuple[str, str], ...] = ()  # files that are not in the set, with the reason


@dataclass(frozen=True, eq=False)
class NoteSet:
    """Notes with what is known of them; open one with `open_notes`."""

    source: str  # where they are, for messages and reports
    names: tuple[str, ...]  # file or note
    keys: tuple[str, ...]  # what each note's sound is: a hash of its file, or its place in a dataset
    pitch: npt.NDArray[np.int32]  # (n,) MIDI, -1 = unknown; asked for, where notes were generated
    labels: tuple[Values, ...]  # of each note the values that are known
    record: Record
    _read: Callable[[Sequence[int], int, int], Tensor] = field(repr=False)  # given the rate in Hz and the samples
    sample_rate: int = SAMPLE_RATE  # Hz

    def __len__(self) -> int:
        return len(self.names)

    @property
    def ids(self) -> tuple[str, ...]:
        """What pairs notes of two sets; see `note_id`."""
        return tuple(note_id(name) for name in self.names)

    @property
    def fingerprint(self) -> str:
        """Hex sum of the names and the sounds, in order."""
        lines = (f"{name}\t{key}\n" for name, key in zip(self.names, self.keys, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def waveforms(
        self,
        rows: Sequence[int] | npt.NDArray[np.int64] | None = None,
        sample_rate: int = SAMPLE_RATE,
        samples: int = SAMPLES,
    ) -> Tensor:
        """Return waveforms (B, samples), float32 in [-1, 1], of the notes at these indices (None: all).

        Args:
            sample_rate: Hz; notes of another are resampled. Metrics hear the default; a model wants its own.

        Raises:
            DataError: a file has changed or gone since the set was opened.
        """
        chosen = range(len(self)) if rows is None else [int(row) for row in rows]
        return self._read(chosen, sample_rate, samples)

    def subset(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> NoteSet:
        """Return the notes at these indices, in this order."""
        places = [int(row) for row in rows]
        names = tuple(self.names[i] for i in places)
        record, kept = self.record, frozenset(names)
        return replace(
            self,
            names=names,
            keys=tuple(self.keys[i] for i in places),
            pitch=self.pitch[places],
            labels=tuple(self.labels[i] for i in places),
            record=replace(
                record,
                resampled=record.resampled & kept,
                padded=record.padded & kept,
                cut=record.cut & kept,
                clipped=record.clipped & kept,
            ),
            _read=lambda chosen, *shape: self._read([places[i] for i in chosen], *shape),
        )

    def mapped(self, name: str, transform: Callable[[Tensor, Sequence[str]], Tensor]) -> NoteSet:
        """Return the same notes with other sounds, computed whenever they are read.

        Args:
            name: of the transform with its parameters; the sounds' keys begin with it.
            transform: makes waveforms (B, 64000) of waveforms (B, 64000) and the notes' keys, each from its own alone.
        """

        def read(chosen: Sequence[int], *shape: int) -> Tensor:
            if shape != (SAMPLE_RATE, SAMPLES):
                raise ValueError(f"{name}: want notes of {SAMPLES:,} samples at {SAMPLE_RATE:,} Hz, got {shape}")
            batches = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
            return torch.cat([transform(self._read(rows, *shape), [self.keys[i] for i in rows]) for rows in batches])

        keys = tuple(f"{name}:{key}" for key in self.keys)
        return replace(self, source=f"{self.source}, {name}", keys=keys, _read=read)

    def shuffled(self, seed: int) -> NoteSet:
        """Return the notes in an order that depends on the seed and on what is in the set, not on its own order."""
        rows = sorted(range(len(self)), key=lambda i: (self.keys[i], self.names[i]))
        order = torch.randperm(len(rows), generator=stream(seed, STREAM)).tolist()
        return self.subset([rows[i] for i in order])

    def by_id(self) -> dict[str, int]:
        """Return the index of each id.

        Raises:
            DataError: an id occurs twice.
        """
        index: dict[str, int] = {}
        for i, key in enumerate(self.ids):
            if key in index:
                raise DataError(
                    f"{self.source}: {self.names[index[key]]} and {self.names[i]} both have the id {key}; "
                    "rename one or keep each in a folder of its own"
                )
            index[key] = i
        return index


def stem(name: str) -> str:
    """Return a note's name without folders and suffix."""
    file = name.rsplit("/", 1)[-1]
    return file.rsplit(".", 1)[0] if file.lower().endswith(SUFFIXES) else file


def note_id(name: str) -> str:
    """Return the id in a note's name, by which notes of two sets are paired.

    An NSynth name is the id itself. Otherwise the number that the name starts with, or the only number in it, without
    leading zeros; otherwise the name. Folders and suffixes do not count.
    """
    name = stem(name)
    if labels_of(name) is not None:
        return name
    numbers = re.findall(r"[0-9]+", name)
    if len(numbers) == 1 or re.match(r"[0-9]", name):
        return str(int(numbers[0]))
    return name


def open_notes(
    path: str | Path | None,
    *,
    split: str = "test",
    allow_bad: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> NoteSet:
    """Open the notes of a folder of audio files, of one split of a packed dataset, or of the built-in notes (None).

    A folder is read with its sub-folders. Labels come from NSynth names, or from the `notes.json` that mars-generate
    writes. A file is refused that cannot be read, is not mono, lasts under 0.1 s, is silent or holds NaN,
    and so is one that `notes.json` lists but is not there; more than the share `allow_bad` of them is an error. Of a
    packed dataset every checksum is checked, since features are kept under it.

    Raises:
        DataError: there is no such folder, dataset or split, or it is damaged.
        TooManyBadError: files were refused.
    """
    if path is None or (Path(path) / "dataset.json").is_file():
        return _packed(path, split, progress)
    return _folder(Path(path), allow_bad, progress)


def pair(real: NoteSet, fake: NoteSet) -> tuple[NoteSet, NoteSet]:
    """Pair up two sets: both in the order of their ids, note for note.

    The partner of a file that was refused is left out too, and listed with the reason.

    Raises:
        DataError: an id occurs twice in a set, or in one set alone, or no pair is left.
    """
    real, fake = _without_partners(real, fake), _without_partners(fake, real)
    places = real.by_id(), fake.by_id()
    for ours, theirs, where in ((places[0], places[1], fake), (places[1], places[0], real)):
        missing = sorted(ours.keys() - theirs.keys())
        if missing:
            more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
            raise DataError(
                f"{real.source} has {len(real):,} notes, {fake.source} {len(fake):,}, and they must pair up by name; "
                f"{where.source} has no note {missing[0]}{more}"
            )
    order = sorted(places[0])
    if not order:
        raise DataError(f"no note of {real.source} can be used in {fake.source} as well")
    return real.subset([places[0][i] for i in order]), fake.subset([places[1][i] for i in order])


def can_pair(real: NoteSet, fake: NoteSet) -> bool:
    """Return whether `pair` finds a partner for every note."""
    try:
        pair(real, fake)
    except DataError:
        return False
    return True


def _without_partners(notes: NoteSet, others: NoteSet) -> NoteSet:
    """Return the notes but for those whose partner among the others was refused."""
    refused = {note_id(name) for name, _ in others.record.refused} - set(others.ids)
    alone = [i for i, key in enumerate(notes.ids) if key in refused]
    paired = notes.subset([i for i, key in enumerate(notes.ids) if key not in refused])
    reasons = tuple((notes.names[i], f"its partner in {others.source} cannot be used") for i in alone)
    return replace(paired, record=replace(paired.record, refused=paired.record.refused + reasons))


def _packed(path: str | Path | None, split: str, progress: Callable[[int, int], None] | None) -> NoteSet:
    dataset = open_dataset(path)
    source = "built-in notes" if path is None else str(path)
    if split not in SPLITS:
        raise DataError(f"want one of the splits {', '.join(SPLITS)}; got {split!r}")
    rows = np.flatnonzero(dataset.column("split") == SPLITS.index(split))
    if not len(rows):
        raise DataError(f"{source} has no notes in the split {split}; name another with `split`")
    note = dataset.samples * 2  # bytes
    dataset.verify(progress and (lambda done, size: progress(done // note, size // note)))

    def read(chosen: Sequence[int], sample_rate: int, samples: int) -> Tensor:
        waveforms = dataset.waveforms(rows[list(chosen)])
        if sample_rate != dataset.sample_rate:
            return resampled(waveforms, dataset.sample_rate, sample_rate, samples)
        waveforms = waveforms[:, :samples]
        return torch.nn.functional.pad(waveforms, (0, samples - waveforms.shape[1]))

    names = tuple(dataset.names[i] for i in rows)
    seconds, whole = dataset.samples / dataset.sample_rate, SAMPLES / SAMPLE_RATE
    return NoteSet(
        source=f"{source} ({split})",
        names=names,
        keys=tuple(f"{dataset.fingerprint}:{i}" for i in rows),
        pitch=dataset.column("pitch")[rows],
        labels=tuple(dataset.known(int(i)) for i in rows),
        record=Record(
            resampled=frozenset(names if dataset.sample_rate != SAMPLE_RATE else ()),
            padded=frozenset(names if seconds < whole else ()),
            cut=frozenset(names if seconds > whole else ()),
        ),
        _read=read,
    )


def resampled(waveforms: Tensor, was: int, sample_rate: int = SAMPLE_RATE, samples: int = SAMPLES) -> Tensor:
    """Return waveforms (B, n) at `was` Hz as (B, samples) at `sample_rate` Hz, in [-1, 1], cut or padded with zeros."""
    recordings = (Recording(waveform[:, None], was, None) for waveform in waveforms.numpy())
    sounds = [convert(one, sample_rate=sample_rate, samples=samples, shortest=0).audio for one in recordings]
    return torch.from_numpy(np.stack(sounds)).clamp(-1, 1)


@dataclass(frozen=True, slots=True)
class _File:
    """A file that was read, or the reason why it is refused."""

    sha256: str = ""
    changes: frozenset[str] = frozenset()  # of `mars.data.decode.CHANGES`
    clipped: bool = False
    reason: str = ""


def _folder(path: Path, allow_bad: float, progress: Callable[[int, int], None] | None) -> NoteSet:
    if not path.is_dir():
        raise DataError(not_a_folder(path, "give a folder of audio files or a packed dataset"))
    conditions = _conditions(path)
    listed = find(path)
    files = listed.files
    if not files:
        raise DataError(f"{path} holds no audio files{listed.why_none()}; want {', '.join(SUFFIXES)}")
    checked = {name: _File(reason=reason) for name, reason in listed.refused.items()}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for file, result in zip(files, pool.map(_check, files), strict=True):
            checked[file.relative_to(path).as_posix()] = result
            if progress is not None:
                progress(len(checked) - len(listed.refused), len(files))
    for name in conditions.keys() - checked.keys():
        checked[name] = _File(reason="listed in notes.json, but there is no such file")
    refused = tuple((name, file.reason) for name, file in sorted(checked.items()) if file.reason)
    if len(refused) > allow_bad * len(checked):
        raise TooManyBadError(
            f"{path}: {len(refused):,} of {len(checked):,} notes cannot be used, the first: {refused[0][0]}: "
            f"{refused[0][1]}; mend them, or allow the fraction of them with `allow_bad`"
        )
    intact = {name: file for name, file in sorted(checked.items()) if not file.reason}
    if not intact:
        raise DataError(f"{path}: none of its {len(refused):,} notes can be used; {refused[0][0]}: {refused[0][1]}")
    names = tuple(intact)

    def read(chosen: Sequence[int], *shape: int) -> Tensor:
        return torch.from_numpy(np.stack([_again(path / names[i], intact[names[i]], *shape) for i in chosen]))

    def changed(how: str) -> frozenset[str]:
        return frozenset(name for name, file in intact.items() if how in file.changes)

    labels = tuple(_labels(name, conditions) for name in names)
    return NoteSet(
        source=str(path),
        names=names,
        keys=tuple(file.sha256 for file in intact.values()),
        pitch=np.array([known.get("pitch", UNKNOWN) for known in labels], np.int32),
        labels=labels,
        record=Record(
            resampled=changed("resampled"),
            padded=changed("padded"),
            cut=changed("cut"),
            clipped=frozenset(name for name, file in intact.items() if file.clipped),
            refused=refused,
        ),
        _read=read,
    )


def _check(path: Path) -> _File:
    try:
        content = read_limited(path, LARGEST)
        sound = _decode(content, SAMPLE_RATE, SAMPLES)
        if reason := fault(sound.audio):
            raise BadFileError(reason)
    except BadFileError as error:
        return _File(reason=str(error))
    except OSError as error:
        return _File(reason=f"unreadable ({error.strerror})")
    return _File(hashlib.sha256(content).hexdigest(), sound.changes, bool(np.abs(sound.audio).max() > 1))


def _decode(content: bytes, sample_rate: int, samples: int, shortest: float = SHORTEST) -> Sound:
    """Decode a mono file to (samples,) at `sample_rate` Hz. Raises `BadFileError`."""
    recording = record(content, samples / sample_rate)
    if recording.channels != 1:
        raise BadFileError(f"want mono; got {recording.channels} channels; mix them to one first")
    return convert(recording, sample_rate=sample_rate, samples=samples, shortest=shortest)


def _again(path: Path, known: _File, sample_rate: int, samples: int) -> Audio:
    """Decode a file that was checked before to (samples,) in [-1, 1] at `sample_rate` Hz."""
    try:
        content = read_limited(path, LARGEST)
    except OSError as error:
        raise DataError(f"{path} was there when the evaluation began ({error.strerror}); start again") from None
    if hashlib.sha256(content).hexdigest() != known.sha256:
        raise DataError(f"{path} has changed since the evaluation began; start again")
    return np.clip(_decode(content, sample_rate, samples, shortest=0).audio, -1, 1)


def _conditions(path: Path) -> dict[str, Values]:
    """Return the labels that `notes.json` says each file was to have; empty where there is none."""
    listing = path / "notes.json"
    if not listing.exists():
        return {}
    content = read_json(listing, DataError)
    try:
        requested = {str(note["file"]): dict(note["condition"]) for note in content["notes"]}
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{listing} is not one that mars-generate wrote; move it elsewhere") from None
    try:
        conditions = {
            file: {name: label(name).listed(value) for name, value in condition.items() if is_name(name)}
            for file, condition in requested.items()
        }
    except ValueError as error:
        raise DataError(f"{listing}: {error}") from None
    return {file: {k: v for k, v in condition.items() if v is not None} for file, condition in conditions.items()}


def _labels(name: str, conditions: dict[str, Values]) -> Values:
    """Return the labels that are known of a note: those it was generated for, or those in its name."""
    if name in conditions:
        return conditions[name]
    labels = labels_of(stem(name))
    return labels.known if labels is not None else {}
