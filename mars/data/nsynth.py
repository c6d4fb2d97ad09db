"""NSynth as it is published: examples.json and audio/*.wav, in a folder or a tar archive.

Engel et al. 2017, arXiv:1704.01279. Archives are read as a stream, never unpacked: no path of theirs is used.
"""

from __future__ import annotations

import codecs
import gzip
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

from mars.data.decode import exactly
from mars.data.kinds import TAR, kind
from mars.data.packed import ALLOW_BAD, Dataset, Writer
from mars.data.splits import SPLITS
from mars.errors import BadFileError, DataError
from mars.files import STRICT
from mars.labels import Labels, labels_in, labels_of

SAMPLE_RATE, SAMPLES = 16_000, 64_000  # Hz; per note
LICENCE = "CC BY 4.0, Google Inc. (the NSynth dataset, magenta.tensorflow.org/datasets/nsynth)"
_LARGEST_WAV = 1 << 20  # bytes; NSynth's have 128,044
_LARGEST_LISTING = 1 << 30  # bytes; that of nsynth-train has 200 MB
_LARGEST_OTHER = 1 << 26  # bytes
_LARGEST_ENTRY = 1 << 16  # characters, of the listing; NSynth's have 700
_LARGEST_HEADER = 1 << 16  # bytes before a file in an archive; NSynth's have 512
_LONGEST_NAME = 255  # characters
_MOST_NOTES = 1_000_000  # of a listing, and files of an archive; nsynth-train has 289,205
_PER_NOTE = {True: 80_000, False: 128_000}  # bytes in an archive, compressed or not: a guess for the bar

Listing = dict[str, Labels | str]  # of each note its labels, or what is wrong with its entry
Entry = tuple[str, bytes | str | Listing]  # base name; content, or the reason why there is none


def pack_nsynth(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    split: str = "auto",
    allow_bad: float = ALLOW_BAD,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Pack folders or archives (.tar, .tar.gz, .tgz) of NSynth into one dataset at `out`.

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
        match = re.search(r"nsynth[-_](train|valid|test)", path.absolute().name)
        return SPLITS.index(match.group(1)) if match else -1
    return SPLITS.index(split) if split in SPLITS else -1


def _count(path: Path) -> int:
    """Estimate how many notes there are. Raises `DataError` for a path that is neither folder nor file."""
    if path.is_dir():
        audio = path / "audio"
        if not audio.is_dir():
            raise DataError(f"{path} has no folder audio; give the folder with examples.json and audio/*.wav")
        return sum(1 for _ in audio.glob("*.wav"))
    if not path.is_file():
        raise DataError(f"{path} does not exist; give NSynth's folder or .tar.gz archive")
    what, cure = kind(path)
    if what not in ("", TAR):
        raise DataError(f"{path} is {what}; want a .tar or .tar.gz archive or a folder of NSynth: {cure}")
    return path.stat().st_size // _PER_NOTE[path.suffix != ".tar"]


def _pack_one(path: Path, writer: Writer, split: int) -> None:
    listing: Listing | None = None
    added = set()
    for file, content in _folder(path) if path.is_dir() else _archive(path):
        if isinstance(content, dict):
            if listing is not None:
                raise DataError(f"{path} has two examples.json; remove one")
            listing = content
            continue
        name = file.removesuffix(".wav")
        labels = labels_of(name)
        added.discard(name)  # a second file of this name makes neither good
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
    for name, known in listing.items():
        if name not in added:
            writer.bad(name, "listed in examples.json, but there is no such file")
        elif isinstance(known, str):
            writer.bad(name, known)
        else:
            writer.relabel(name, known)
    for name in sorted(added - listing.keys()):
        writer.bad(name, "not listed in examples.json")


def _read_listing(file: IO[bytes], where: str) -> Listing:
    """Read what examples.json says of each note, in pieces, so that only the result takes memory.

    Raises `DataError` for anything but a JSON object of at most a million notes.
    """
    listing: Listing = {}
    try:
        for name, entry in _items(codecs.iterdecode(iter(lambda: file.read(_LARGEST_ENTRY), b""), "utf-8")):
            if name in listing:
                raise ValueError(f"{name} appears twice")
            if len(listing) >= _MOST_NOTES or len(name) > _LONGEST_NAME:
                raise ValueError(f"more than {_MOST_NOTES:,} notes, or a name of over {_LONGEST_NAME} characters")
            try:
                listing[name] = _labels(name, entry)
            except BadFileError as error:
                listing[name] = str(error)
    except (ValueError, RecursionError) as error:
        place = f"after {next(reversed(listing))}: " if listing else ""
        reason = getattr(error, "msg", error)  # json counts lines from where a piece begins
        raise DataError(f"{where} is not valid JSON of notes ({place}{reason}); fetch it again") from None
    return listing


def _items(pieces: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Yield keys and values of a JSON object one by one. Raises `ValueError` for anything else, `RecursionError`."""
    ahead = next(pieces, "")
    begin = re.match(r"[ \t\r\n]*\{[ \t\r\n]*(\}?)", ahead)
    if begin is None:
        raise ValueError("want an object of notes")
    at, more = begin.end(), not begin[1]
    while more:
        try:
            name, entry, more, end = _item(ahead, at)
        except (ValueError, RecursionError):  # it may only have been cut
            piece = next(pieces, "")
            if not piece or len(ahead) - at > _LARGEST_ENTRY:
                raise
            ahead, at = ahead[at:] + piece, 0
            continue
        yield name, entry
        at = end
    if ahead[at:].strip() or any(piece.strip() for piece in pieces):
        raise ValueError("more follows its end")


def _item(text: str, at: int) -> tuple[str, Any, bool, int]:
    """Return the key and value at `at`, whether a comma follows, and where the next begins. Raises as `_items`."""
    name, at = STRICT.raw_decode(text, at)
    colon = re.compile(r"[ \t\r\n]*:[ \t\r\n]*").match(text, at)
    if not isinstance(name, str) or colon is None:
        raise ValueError("want a name in quotes and a colon")
    entry, at = STRICT.raw_decode(text, colon.end())
    after = re.compile(r"[ \t\r\n]*([,}])[ \t\r\n]*").match(text, at)
    if after is None:
        raise ValueError("want a comma or the end after an entry")
    return name, entry, after[1] == ",", after.end()


def _labels(name: str, entry: Any) -> Labels:
    """Check one entry of examples.json. Raises `BadFileError`."""
    if not isinstance(entry, dict):
        raise BadFileError(f"its entry of examples.json is no object but {type(entry).__name__}")
    labels = labels_in(entry)
    for key, want in {"note_str": name, "sample_rate": SAMPLE_RATE}.items():
        if entry.get(key, want) != want:
            raise BadFileError(f"examples.json: want {key} {want!r}, got {entry[key]!r:.40}")
    return labels


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
            elif file is listing:
                with file.open("rb") as stream:
                    yield file.name, _read_listing(stream, str(file))
            else:
                yield file.name, file.read_bytes()
        except OSError as error:
            yield file.name, f"unreadable ({error.strerror})"


class _Stream:
    """Reads a file, through gzip where it is compressed, and knows how far anything but zeros has come.

    tarfile takes a damaged or missing header for the end of the archive; `end` tells the difference. And it keeps
    whatever comes before a file in the way of long names, attributes and maps of holes: nothing past `limit` is read.
    """

    def __init__(self, file: BinaryIO) -> None:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        self._file = gzip.GzipFile(fileobj=file) if compressed else file
        self.count = self.end = 0  # bytes; all read, and up to the last that is not zero
        self.limit = _LARGEST_HEADER  # bytes

    def read(self, size: int) -> bytes:
        if self.count >= self.limit:
            raise tarfile.ReadError(f"over {_LARGEST_HEADER:,} bytes of headers before a file")
        content = self._file.read(size)
        if some := content.rstrip(b"\0"):
            self.end = self.count + len(some)
        self.count += len(content)
        return content

    def drain(self) -> None:
        """Read to the end, where gzip checks its sum; gives up on what cannot be padding."""
        self.limit = self.count + (1 << 28)
        while self.count < self.limit:
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
                    if count >= _MOST_NOTES or member.size > limit or len(name) > _LONGEST_NAME:
                        raise DataError(f"{path} is no archive of NSynth: {name!r:.80} breaks its limits")
                    stream.limit = archive.offset + _LARGEST_HEADER
                    if not member.isdir() and (name == "examples.json" or name.endswith(".wav")):
                        yield name, _content(archive, member, f"{path}: {name}")
                    # They would pile up: 300 MB for nsynth-train.
                    archive.members.clear()  # type: ignore[attr-defined]
                    archive.pax_headers.clear()  # type: ignore[attr-defined]
                end = archive.offset
                stream.drain()
            if stream.end > end or stream.count < end + tarfile.BLOCKSIZE:
                raise EOFError("its end is missing or damaged")
    except DataError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError, OSError) as error:
        raise DataError(f"{path} is not a whole tar archive ({error}); fetch it again") from None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> bytes | str | Listing:
    path = PurePosixPath(member.name)
    if not member.isreg():
        return "not a regular file"
    if path.is_absolute() or ".." in path.parts:
        return "its path leads out of the archive"
    if path.suffix == ".wav" and member.size > _LARGEST_WAV:
        return f"larger than {_LARGEST_WAV:,} bytes"
    content = archive.extractfile(member)
    if content is None:
        return "not a regular file"
    return content.read() if path.suffix == ".wav" else _read_listing(content, where)
