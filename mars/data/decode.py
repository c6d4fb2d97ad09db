"""Any audio file as one mono waveform, and what had to be done to it.

libsndfile reads most formats, FFmpeg (where it is installed) the others. Files whose own account of their length is
wrong or missing (written to a pipe, joined, MP3s without a header) are read to their end.
"""

from __future__ import annotations

import io
import math
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from mars.data import mpeg
from mars.data.notes import SHORTEST, Audio, fit
from mars.errors import BadFileError, needed

SUFFIXES = (
    *(".wav", ".wave", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc"),
    *(".au", ".snd", ".caf"),
    *(".m4a", ".m4b", ".aac", ".wma", ".wv", ".ape", ".mka", ".ac3", ".amr"),  # through FFmpeg
)
CHANGES = {  # what may happen to a note's sound, and how it is told of so many
    "cut": "cut to {seconds:g} s",
    "padded": "padded with silence to {seconds:g} s",
    "resampled": "resampled to {rate:,} Hz",
    "mixed": "mixed to mono",
    "one channel": "taken from the loudest channel, since the channels cancel",
    "scaled": "made quieter, to stay within full scale",
}

_MOST = 1 << 30  # bytes read of a file that has to be looked at as a whole
_MOST_CHUNKS = 10_000  # looked at before the sound
_PIPE = 0x7FF0_0000  # bytes; larger sizes are what programs write into a pipe, whose length they cannot know
_SOUNDING = 0.01  # of the loudest channel's level; quieter ones of more than two channels are left out
_CANCELS = 0.5  # of the level of a mix of unrelated channels; below it the channels cancel
_PATIENCE = 120  # s for FFmpeg
# Files of sound alone: playlists and the like would have FFmpeg open other files.
_FFMPEG_FORMATS = "mov,mp4,m4a,aac,asf,matroska,webm,ogg,wv,ape,caf,ac3,eac3,amr,aiff,au,w64,wav,flac,mp3,tta,dsf"


class _Layout(NamedTuple):
    """How a kind of file lines up its chunks."""

    header: str  # of a chunk, name and size, as `struct` has it
    first: int  # where the first chunk begins
    sound: bytes  # how the name of the chunk with the sound begins
    counted: int = 0  # bytes of the header that its size includes
    aligned: int = 2  # bytes that a chunk is filled up to


_LAYOUTS = {  # by the first bytes of a file
    b"RIFF": _Layout("<4sI", 12, b"data"),
    b"RF64": _Layout("<4sI", 12, b"data"),
    b"FORM": _Layout(">4sI", 12, b"SSND"),
    b"riff": _Layout("<16sQ", 40, b"data", counted=24, aligned=8),
}


@dataclass(frozen=True, slots=True)
class Recording:
    """The beginning of a file as it is."""

    audio: npt.NDArray[np.float32]  # (frames, channels); more frames than were wanted if there are more
    rate: int  # Hz
    frames: int | None  # of the whole file, where it says so

    @property
    def channels(self) -> int:
        """How many."""
        return int(self.audio.shape[1])


@dataclass(frozen=True, slots=True)
class Sound:
    """A waveform to pack, and what was done to it."""

    audio: Audio  # (samples,)
    changes: frozenset[str]  # of CHANGES


def decode(source: Path | bytes, *, sample_rate: int, samples: int, shortest: float = SHORTEST) -> Sound:
    """Decode a file or its content to (samples,) at `sample_rate` Hz: mixed to mono, resampled, cut or padded.

    No more is read than is needed, whatever length the file claims.

    Raises:
        BadFileError: the file will not do, or lasts under `shortest` seconds.
        MissingPackage: soxr is needed and missing.
    """
    recording = record(source, max(samples / sample_rate, shortest))
    return convert(recording, sample_rate=sample_rate, samples=samples, shortest=shortest)


def exactly(content: bytes, *, sample_rate: int, samples: int) -> Audio:
    """Decode a mono file of exactly this rate and length. Raises `BadFileError` for any other."""
    recording = record(content, samples / sample_rate)
    rate, channels, frames = recording.rate, recording.channels, recording.frames
    if (rate, channels, frames) != (sample_rate, 1, samples):
        raise BadFileError(
            f"want {samples} frames, mono, at {sample_rate} Hz; got {frames} frames, {channels} channels, {rate} Hz"
        )
    return recording.audio[:, 0]


def convert(recording: Recording, *, sample_rate: int, samples: int, shortest: float = SHORTEST) -> Sound:
    """See `decode`."""
    rate = recording.rate
    want = math.ceil(samples * rate / sample_rate)
    if len(recording.audio) < shortest * rate:
        raise BadFileError(f"too short: {len(recording.audio) / rate:.3f} s, want at least {shortest} s")
    audio, how = _mono(recording.audio[:want])
    changes = {how} - {""}
    if len(recording.audio) > want:
        changes.add("cut")
    elif len(recording.audio) < want:
        changes.add("padded")
    if rate != sample_rate:
        with needed(f"a file at {rate} Hz, where {sample_rate} are wanted,", "soxr"):
            import soxr
        audio = soxr.resample(audio, rate, sample_rate)
        changes.add("resampled")
    return Sound(fit(audio, samples), frozenset(changes))


def _mono(audio: npt.NDArray[np.float32]) -> tuple[Audio, str]:
    """Mix (frames, channels) to mono: the mean, or the loudest channel if they cancel; and which of CHANGES that is."""
    count = audio.shape[1]
    if count == 1:
        return audio[:, 0], ""
    with np.errstate(all="ignore"):  # NaN and infinity are found later
        levels = np.sqrt(np.square(audio, dtype=np.float64).mean(0))
        # Of two channels a silent one counts: a sound on one side is half as loud in the middle.
        sounding = levels >= _SOUNDING * levels.max() if count > 2 else np.full(2, True)
        mix = audio.mean(1) if sounding.all() or not sounding.any() else audio[:, sounding].mean(1)
        level = np.sqrt(np.square(mix, dtype=np.float64).mean())
        unrelated = np.sqrt(np.square(levels[sounding]).sum()) / max(int(sounding.sum()), 1)
        if level < _CANCELS * unrelated:
            return audio[:, int(levels.argmax())], "one channel"
    return mix, "mixed"


class _Unknown(Exception):
    """libsndfile does not know the format; the message is what it said."""


def record(source: Path | bytes, seconds: float) -> Recording:
    """Read the first `seconds` of a file or its content, and one frame more if there is one.

    Raises:
        BadFileError: it cannot be read, or ends before its header says and before those seconds.
    """
    parts: list[Recording] = []
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            if not file.read(1):
                raise BadFileError("unreadable (it is empty)")
            for part in _parts(file):
                parts.append(_read(part, seconds, sum(len(one.audio) for one in parts)))
    except _Unknown as unknown:
        if isinstance(source, Path):
            return record(_through_ffmpeg(source, seconds, str(unknown)), seconds)
        raise BadFileError(f"unreadable ({unknown}): convert it to WAV or FLAC") from None
    except OSError as error:
        raise BadFileError(f"unreadable ({error.strerror or error})") from None
    if len(parts) == 1:
        return parts[0]
    return Recording(np.concatenate([one.audio for one in parts]), parts[0].rate, None)


def _read(stream: BinaryIO, seconds: float, before: int) -> Recording:
    """Return what libsndfile reads of a stream, given the frames that came before it."""
    import soundfile

    guard = _Guard(stream)
    try:
        try:
            file = soundfile.SoundFile(guard)
        except soundfile.LibsndfileError as error:
            raise _Unknown(error.error_string.strip()) from None
        with file:
            # Else it seeks after every read, which fails at the end of a FLAC of unknown length.
            file.seekable = lambda: False
            rate, channels = file.samplerate, file.channels
            frames = file.frames if file.frames < 1 << 62 else None
            if not (1000 <= rate <= 384_000 and channels <= 16):
                raise BadFileError(
                    f"out of range: want 1 to 384 kHz and at most 16 channels; got {rate} Hz, {channels}"
                )
            if frames == 0 and file.format == "OGG":
                raise BadFileError("cut short: it has no end")
            if file.format == "MP3" and file.subtype != "MPEG_LAYER_III":
                frames = None  # a guess from the size
            want = math.ceil(seconds * rate) + 1 - before
            if frames is not None:
                want = min(frames, want)
            audio = file.read(max(want, 0), np.float32, always_2d=True)
    except soundfile.LibsndfileError as error:
        raise BadFileError(f"unreadable ({error.error_string.strip()})") from None
    except (ValueError, TypeError, AssertionError, MemoryError) as error:
        if isinstance(error, BadFileError):
            raise
        raise BadFileError(f"unreadable ({error or type(error).__name__})") from None
    finally:
        if guard.error is not None:
            raise guard.error
    if frames is not None and len(audio) < want:
        raise BadFileError(f"cut short: {frames:,} frames claimed, {len(audio):,} found")
    return Recording(audio, rate, frames)


class _Guard:
    """A file as libsndfile may read it: what an error raises inside its callbacks would go to the terminal."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._at = file, 0
        self._size = file.seek(0, io.SEEK_END)
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position in the file; one before its start changes nothing."""
        target = offset + (0, self._at, self._size)[whence]
        if target >= 0:
            self._at = target
        return self._at

    def tell(self) -> int:
        """Return the position in the file, in bytes."""
        return self._at

    def read(self, count: int) -> bytes:
        """Return the next bytes, or none if they cannot be read: `error` then says why."""
        try:
            self._file.seek(min(self._at, self._size))
            content = self._file.read(count)
        except OSError as error:
            self.error, content = error, b""
        self._at += len(content)
        return content


def _parts(file: BinaryIO) -> list[BinaryIO]:
    """Return what a file holds, one after another, with sizes that can be trusted."""
    file.seek(0)
    head = file.read(12)
    if head[:4] in _LAYOUTS:
        return [_chunks(file, _LAYOUTS[head[:4]])]
    if head[:4] == b".snd" and len(head) == 12:
        start, size = struct.unpack(">II", head[4:])
        _check_size(size, file.seek(0, io.SEEK_END) - start)
    if head[:3] == b"ID3" or (len(head) == 12 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):
        file.seek(0)
        if streams := mpeg.streams(file.read(_MOST)):
            return [io.BytesIO(stream) for stream in streams]
    return [file]


def _chunks(file: BinaryIO, layout: _Layout) -> BinaryIO:
    """Return a file of chunks (WAV, AIFF, Wave64) whose sound has its claimed size, or else the rest of the file.

    Raises:
        BadFileError: it has less.
    """
    end, at, long = file.seek(0, io.SEEK_END), layout.first, 0
    length = struct.calcsize(layout.header)
    for _ in range(_MOST_CHUNKS):
        if at + length > end:
            break
        file.seek(at)
        name, size = struct.unpack(layout.header, file.read(length))
        size, at = size - layout.counted, at + length
        if name == b"ds64":  # the sizes of an RF64, of 64 bits
            long = int.from_bytes(file.read(16)[8:], "little")
        if size < 0 or not name.startswith(layout.sound):
            at += max(size, 0) + -size % layout.aligned
            continue
        remaining = end - at
        _check_size(long or size, remaining)
        if size == 0 and remaining and length == 8 and not _is_chunk(file.read(8), layout, remaining):
            file.seek(0)
            content = bytearray(file.read(_MOST))
            order = layout.header[0]
            struct.pack_into(f"{order}I", content, 4, len(content) - 8)
            struct.pack_into(f"{order}I", content, at - 4, len(content) - at)
            return io.BytesIO(content)
        break
    return file


def _check_size(claimed: int, actual: int) -> None:
    """Refuse a file with fewer bytes of sound than it claims, if it does claim a number."""
    if actual < claimed and not (_PIPE <= claimed < 1 << 32 or claimed >= 1 << 60):
        raise BadFileError(f"cut short: {claimed:,} bytes of sound claimed, {actual:,} found")


def _is_chunk(head: bytes, layout: _Layout, remaining: int) -> bool:
    """Return whether another chunk begins here, as after an empty one."""
    if len(head) < 8 or not (head[:4].isascii() and head[:4].decode().isprintable()):
        return False
    return bool(struct.unpack(layout.header, head)[1] <= remaining - 8)


def _through_ffmpeg(path: Path, seconds: float, reason: str) -> bytes:
    """Return the beginning of a file as a WAV. Raises `BadFileError` where there is no FFmpeg or it finds no sound."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise BadFileError(
            f"unreadable without FFmpeg ({reason}): if it is sound, install FFmpeg or convert it to WAV or FLAC"
        )
    url = f"file:{path.absolute()}"
    command = [
        program, "-nostdin", "-hide_banner", "-v", "error", "-xerror",
        "-protocol_whitelist", "file", "-format_whitelist", _FFMPEG_FORMATS, "-i", url,
        "-map", "0:a:0", "-t", f"{seconds + 0.1:.3f}", "-c:a", "pcm_f32le", "-f", "wav", "-",
    ]  # fmt: skip
    try:
        # A list of arguments, of which only the file's path is not ours.
        done = subprocess.run(  # noqa: S603
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        raise BadFileError(f"unreadable (FFmpeg was not done with it in {_PATIENCE} s)") from None
    if done.returncode != 0 or not done.stdout:
        message = done.stderr.decode(errors="replace").strip().splitlines() or [reason]
        raise BadFileError(f"unreadable ({message[-1].removeprefix(url).lstrip(': ')})")
    return done.stdout
