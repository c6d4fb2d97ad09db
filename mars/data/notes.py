"""What every source of notes shares: names, audio of one length, the check of a note, JSON from strangers."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mars import files
from mars.config import FAMILIES, SOURCES
from mars.errors import BadFileError, DataError
from mars.optional import needed

Audio = npt.NDArray[np.float32]  # (samples,), 1.0 is full scale

UNKNOWN = -1  # a label that nobody gave
SILENT = 1e-4  # a note whose peak stays below this is taken for silence
SHORTEST = 0.1  # s; shorter files are taken for rubbish
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


def read_audio(
    source: Path | bytes, *, sample_rate: int, samples: int, shortest: float = SHORTEST, exact: bool = False
) -> Audio:
    """A file or its content as (samples,) at `sample_rate` Hz: mixed to mono, resampled, cut or padded.

    No more is read than is needed, whatever length the file claims. `exact` wants a mono file of just that
    rate and length. Raises `BadFileError` for a file that will not do or lasts under `shortest` seconds, and
    `MissingPackage` where soxr is needed and missing.
    """
    import soundfile

    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            head = stream.read(8)
            stream.seek(0)
            claim = int.from_bytes(head[4:], "little") + 8
            # All bits set is how a program that writes to a pipe says that it does not know.
            if head[:4] == b"RIFF" and size < claim < 1 << 32:
                raise BadFileError(f"cut short: its header claims {claim:,} bytes, it has {size:,}")
            with soundfile.SoundFile(stream) as file:
                rate, channels, frames = file.samplerate, file.channels, file.frames
                if exact and (rate, channels, frames) != (sample_rate, 1, samples):
                    raise BadFileError(
                        f"want {samples} frames, mono, at {sample_rate} Hz; "
                        f"got {frames} frames, {channels} channels, {rate} Hz"
                    )
                if not (1000 <= rate <= 384_000 and channels <= 16):
                    raise BadFileError(f"want 1 to 384 kHz and at most 16 channels; got {rate} Hz, {channels}")
                want = min(frames, math.ceil(samples * rate / sample_rate))
                audio = file.read(want, np.float32, always_2d=True).mean(1)
    except BadFileError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, OSError, MemoryError) as error:
        raise BadFileError(f"unreadable ({error or type(error).__name__})") from None
    if len(audio) < want:
        raise BadFileError(f"cut short: {want} frames claimed, {len(audio)} found")
    if len(audio) < shortest * rate:
        raise BadFileError(f"too short: {len(audio) / rate:.3f} s, want at least {shortest} s")
    if rate != sample_rate:
        with needed(f"a file at {rate} Hz, where {sample_rate} are wanted,", "soxr"):
            import soxr
        audio = soxr.resample(audio, rate, sample_rate)
    return fit(audio, samples)


def parse_json(text: bytes | str, where: str) -> Any:
    """Strict JSON, see `mars.files.parse_json`. Raises `DataError` naming `where`."""
    return files.parse_json(text, where, DataError)
