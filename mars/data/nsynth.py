"""NSynth as it is published: examples.json and audio/*.wav, in a folder or a tar archive.

Engel et al. 2017, arXiv:1704.01279. Archives are read as a stream, never unpacked: no path of theirs is used.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from mars.config import FAMILIES, SOURCES
from mars.data.decode import exactly
from mars.data.notes import Labels, labels_of, parse_json
from mars.data.packed import ALLOW_BAD, Dataset, Writer
from mars.data.splits import SPLITS
from mars.errors import BadFileError, DataError

SAMPLE_RATE, SAMPLES = 16_000, 64_000  # Hz; per note
LICENCE = "CC BY 4.0, Google Inc. (the NSynth dataset, magenta.tensorflow.org/datasets/nsynth)"
_LARGEST_WAV = 1 << 20  # bytes; NSynth's have 128,044
_LARGEST_LISTING = 1 << 30  # bytes; that of nsynth-train has 200 MB
_LARGEST_OTHER = 1 << 26  # bytes
_MOST_MEMBERS = 1_000_000  # of an archive; nsynth-train has 289,207
_PER_NOTE = {True: 80_000, False: 128_000}  # bytes in an archive, compressed or not: a guess for the bar

Entry = tuple[str, bytes | str]  # base name; content, or the reason why there is none


def pack_nsynth(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    split: str = "auto",
    allow_bad: float = ALLOW_BAD,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Packs folders or archives (.tar, .tar.gz, .tgz) of NSynth into one dataset at `out`.

    `split` is "auto" (the official one where the name of the path states it, as nsynth-valid.jsonwav.tar.gz
    does, else as `hold_out` sees fit), "instrument", or "train", "valid" or "test" for all. A note is bad if its file
    or its entry of examples.json is wrong or missing; without examples.json the files' names are the labels.

    Raises `DataError`, `TooManyBadError` and `DiskError`.
    """
    sources = [Path(path) for path in paths]
    origin = {"kind": "nsynth", "files": [path.name for path in sources], "licence": LICENCE}
    expected = sum(_count(path) for path in sources)
    with Writer(
        out, sample_rate=SAMPLE_RATE, samples=SAMPLES, origin=origin, expected=expected, progress=progress
    ) as writer:
        for path in sources:
            _pack_one(path, writer, _split_of(path, split))
        return writer.commit(allow_bad, "instruments" if split == "instrument" else None)


def _split_of(path: Path, split: str) -> int:
    if split == "auto":
        found = re.search(r"nsynth[-_](train|valid|test)", path.absolute().name)
        return SPLITS.index(found.group(1)) if found else -1
    return SPLITS.index(split) if split in SPLITS else -1


def _count(path: Path) -> int:
    """About how many notes there are. Raises `DataError` for a path that is neither folder nor file."""
    if path.is_dir():
        audio = path / "audio"
        if not audio.is_dir():
            raise DataError(f"{path} has no folder audio; give the folder with examples.json and audio/*.wav")
        return sum(1 for _ in audio.glob("*.wav"))
    if not path.is_file():
        raise DataError(f"{path} does not exist; give NSynth's folder or .tar.gz archive")
    return path.stat().st_size // _PER_NOTE[path.suffix != ".tar"]


def _pack_one(path: Path, writer: Writer, split: int) -> None:
    listing: dict[str, Any] | None = None
    added = set()
    for file, content in _folder(path) if path.is_dir() else _archive(path):
        if file == "examples.json" and isinstance(content, bytes):
            if listing is not None:
                raise DataError(f"{path} has two examples.json; remove one")
            listing = parse_json(content, f"{path}: examples.json")
            if not isinstance(listing, dict):
                raise DataError(f"{path}: examples.json: want an object of notes, got {type(listing).__name__}")
            continue
        name = file.removesuffix(".wav")
        labels = labels_of(name)
        try:
            if isinstance(content, str):
                raise BadFileError(content)
            if labels is None:
                raise BadFileError("not named like an NSynth note, as in bass_electronic_018-060-075.wav")
            audio = exactly(content, sample_rate=SAMPLE_RATE, samples=SAMPLES)
        except BadFileError as error:
            writer.bad(name, str(error))
            continue
        if writer.add(name, audio, labels, split):
            added.add(name)
    if listing is None:
        return
    for name, entry in listing.items():
        try:
            if name not in added:
                raise BadFileError("listed in examples.json, but there is no such file")
            writer.relabel(name, _labels(name, entry))
        except BadFileError as error:
            writer.bad(name, str(error))
    for name in sorted(added - listing.keys()):
        writer.bad(name, "not listed in examples.json")


def _labels(name: str, entry: Any) -> Labels:
    """Checks one entry of examples.json. Raises `BadFileError`."""
    if not isinstance(entry, dict):
        raise BadFileError(f"its entry of examples.json is no object but {type(entry).__name__}")
    limits = {
        "instrument_family": len(FAMILIES),
        "instrument_source": len(SOURCES),
        "pitch": 128,
        "velocity": 128,
    }
    values = []
    for key, limit in limits.items():
        value = entry.get(key)
        if type(value) is not int or not 0 <= value < limit:  # a bool is no number here
            raise BadFileError(f"examples.json: want {key} 0..{limit - 1}, got {value!r:.40}")
        values.append(value)
    instrument = entry.get("instrument_str")
    if not isinstance(instrument, str) or not instrument.isprintable() or not 0 < len(instrument) < 256:
        raise BadFileError(f"examples.json: want a name for instrument_str, got {instrument!r:.40}")
    claims = {
        "note_str": name, "sample_rate": SAMPLE_RATE,
        "instrument_family_str": FAMILIES[values[0]], "instrument_source_str": SOURCES[values[1]],
    }  # fmt: skip
    for key, want in claims.items():
        if entry.get(key, want) != want:
            raise BadFileError(f"examples.json: want {key} {want!r}, got {entry[key]!r:.40}")
    return Labels(instrument, *values)


def _folder(path: Path) -> Iterator[Entry]:
    listing = path / "examples.json"
    files = sorted((path / "audio").glob("*.wav"))
    for file in [listing, *files] if listing.exists() else files:
        limit = _LARGEST_LISTING if file is listing else _LARGEST_WAV
        try:
            if file.is_symlink() or not file.is_file():
                yield file.name, "not a regular file"
            elif file.stat().st_size > limit:
                yield file.name, f"larger than {limit:,} bytes"
            else:
                yield file.name, file.read_bytes()
        except OSError as error:
            yield file.name, f"unreadable ({error.strerror})"


class _Stream:
    """Reads a file, through gzip where it is compressed, and knows how far anything but zeros has come.

    tarfile takes a damaged or missing header for the end of the archive; `end` tells the difference.
    """

    def __init__(self, file: BinaryIO) -> None:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        self._file = gzip.GzipFile(fileobj=file) if compressed else file
        self.count = self.end = 0  # bytes; all read, and up to the last that is not zero

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        if some := content.rstrip(b"\0"):
            self.end = self.count + len(some)
        self.count += len(content)
        return content

    def drain(self) -> None:
        """Reads to the end, where gzip checks its sum; gives up on what cannot be padding."""
        for _ in range(256):
            if not self.read(1 << 20):
                return
        raise EOFError("too much after its end")


def _archive(path: Path) -> Iterator[Entry]:
    try:
        with path.open("rb") as file:
            stream = _Stream(file)
            with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r|") as archive:
                for count, member in enumerate(archive):
                    name = PurePosixPath(member.name).name
                    limit = _LARGEST_LISTING if name == "examples.json" else _LARGEST_OTHER
                    if count >= _MOST_MEMBERS or member.size > limit:
                        raise DataError(f"{path} is no archive of NSynth: {name!r:.80} breaks its limits")
                    if not member.isdir() and (name == "examples.json" or name.endswith(".wav")):
                        yield name, _content(archive, member)
                    # They would pile up: 300 MB for nsynth-train.
                    archive.members.clear()  # type: ignore[attr-defined]
                end = archive.offset
                stream.drain()
            if stream.end > end or stream.count < end + tarfile.BLOCKSIZE:
                raise EOFError("its end is missing or damaged")
    except (tarfile.TarError, EOFError, zlib.error, UnicodeError, OSError) as error:
        raise DataError(f"{path} is not a whole tar archive ({error}); fetch it again") from None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | str:
    path = PurePosixPath(member.name)
    if not member.isreg():
        return "not a regular file"
    if path.is_absolute() or ".." in path.parts:
        return "its path leads out of the archive"
    if path.suffix == ".wav" and member.size > _LARGEST_WAV:
        return f"larger than {_LARGEST_WAV:,} bytes"
    content = archive.extractfile(member)
    return content.read() if content else "not a regular file"
