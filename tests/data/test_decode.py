"""Sound files of every kind: whole, odd, damaged."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mars.data.decode import CHANGES, _Guard, decode, exactly
from mars.errors import BadFileError

RATE, SAMPLES = 16_000, 32_000  # Hz; two seconds


def tone(seconds: float = 1.0, level: float = 0.5, rate: int = RATE) -> np.ndarray:
    return level * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


def content(audio: np.ndarray, format: str = "WAV", subtype: str | None = None, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=format, subtype=subtype)
    return file.getvalue()


def heard(source: bytes | Path) -> np.ndarray:
    return decode(source, sample_rate=RATE, samples=SAMPLES).audio


def level(audio: np.ndarray) -> float:
    return float(np.abs(audio[4000:12_000]).max())


@pytest.mark.parametrize("format", ["WAV", "WAVEX", "RF64", "W64", "FLAC", "AIFF", "AU", "CAF"])
def test_formats(format):
    np.testing.assert_allclose(heard(content(tone(), format))[:RATE], tone(), atol=1e-4)


# Channels


def channels(*levels: float) -> np.ndarray:
    return np.stack([tone(level=level) for level in levels], 1)


@pytest.mark.parametrize(
    ("levels", "wanted", "change"),
    [
        ((0.5, 0.5), 0.5, "mixed"),
        ((0.5, 0.0), 0.25, "mixed"),
        ((0.5, -0.5), 0.5, "one channel"),
        ((0.45, -0.5), 0.5, "one channel"),
        ((0.5, -0.1), 0.2, "mixed"),
        ((0.0, 0.0, 0.5, 0.0, 0.0, 0.0), 0.5, "mixed"),  # the centre of 5.1
        ((0.5, 0.5, 0.0, 0.0, 0.0, 0.0), 0.5, "mixed"),
        ((0.5, -0.5, 0.0, 0.0, 0.0, 0.0), 0.5, "one channel"),
        ((0.4, 0.4, 0.4, 0.4), 0.4, "mixed"),
    ],
)
def test_channels_are_mixed_or_the_loudest_is_taken(levels, wanted, change):
    sound = decode(content(channels(*levels), subtype="FLOAT"), sample_rate=RATE, samples=RATE)
    assert level(sound.audio) == pytest.approx(wanted, abs=0.01)
    assert sound.changes == {change}


def test_unrelated_channels_are_mixed():
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (RATE, 8))
    sound = decode(content(noise, subtype="FLOAT"), sample_rate=RATE, samples=RATE)
    np.testing.assert_allclose(sound.audio, noise.mean(1), atol=1e-6)
    assert sound.changes == {"mixed"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_stay_to_be_refused(value):
    audio = channels(0.5, -0.5)
    audio[5] = value
    assert not np.isfinite(heard(content(audio, subtype="FLOAT"))).all()


def test_what_was_done_is_told():
    def changes(seconds: float, rate: int) -> set[str]:
        return set(decode(content(tone(seconds, rate=rate), rate=rate), sample_rate=RATE, samples=SAMPLES).changes)

    assert changes(2, RATE) == set()
    assert changes(2, 8000) == {"resampled"}
    assert changes(2.5, RATE) == {"cut"}
    assert changes(1.5, 44_100) == {"padded", "resampled"}
    assert changes(2.5, RATE) <= CHANGES.keys()


def test_the_shortest_may_be_longer_than_what_is_kept():
    whole = content(tone(3))
    assert decode(whole, sample_rate=RATE, samples=RATE, shortest=2).changes == {"cut"}
    with pytest.raises(BadFileError, match=r"too short: 3\.000 s, want at least 4 s"):
        decode(whole, sample_rate=RATE, samples=RATE, shortest=4)


# Sizes that are wrong


def wave(data: int, riff: int, frames: int = RATE, after: bytes = b"") -> bytes:
    """A WAV of these sizes; the sound is a second, or shorter."""
    audio = (tone() * 32767).astype("<i2").tobytes()[: 2 * frames]
    form = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)
    head = b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt " + struct.pack("<I", 16) + form
    return head + b"data" + struct.pack("<I", data) + audio + after


SIZE = 2 * RATE


@pytest.mark.parametrize(
    ("data", "riff"),
    [
        (SIZE, SIZE + 36),
        (SIZE, 0),
        (SIZE, 100),
        (SIZE, SIZE + 36 + 8),
        (0, 0),
        (0, SIZE + 36),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF - 36, 0xFFFFFFFF),
        (0x7FFFF000, 0x7FFFF024),
        (0x7FFFFFFF - 36, 0x7FFFFFFF),
        (0x80000000, 0x80000024),
    ],
)
def test_a_wave_file_from_a_pipe_is_whole(data, riff):
    audio = heard(wave(data, riff))
    np.testing.assert_allclose(audio[:RATE], tone(), atol=1e-4)
    assert not audio[RATE:].any()


def test_an_empty_chunk_is_empty():
    with pytest.raises(BadFileError, match=r"too short: 0\.000 s"):
        heard(wave(0, 48, frames=0, after=b"LIST\x04\0\0\0INFO"))


@pytest.mark.parametrize("format", ["AIFF", "FLAC"])
def test_other_files_from_a_pipe_are_whole(format):
    whole = bytearray(content(tone(), format))
    if format == "AIFF":
        struct.pack_into(">I", whole, whole.index(b"SSND") + 4, 0)
    else:  # the 36 bits of the number of samples
        whole[21] &= 0xF0
        whole[22:26] = bytes(4)
    np.testing.assert_allclose(heard(bytes(whole))[:RATE], tone(), atol=1e-4)


@pytest.mark.parametrize("format", ["WAV", "RF64", "W64", "AIFF", "AU", "FLAC"])
def test_half_a_file_is_not_taken_for_a_whole_one(format):
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, RATE)
    whole = content(audio, format)
    with pytest.raises(BadFileError, match=r"cut short|unreadable"):
        heard(whole[: len(whole) // 2])


def test_an_empty_file_says_so():
    with pytest.raises(BadFileError, match="empty"):
        heard(b"")


def test_a_file_of_endless_chunks_ends():
    content = b"RIFF" + struct.pack("<I", 8 << 20) + b"WAVE" + b"junk\0\0\0\0" * (1 << 20)
    with pytest.raises(BadFileError):
        heard(content)


def test_exactly():
    audio = exactly(content(tone(2)), sample_rate=RATE, samples=SAMPLES)
    np.testing.assert_allclose(audio, tone(2), atol=1e-4)
    for other in (content(tone(2.1)), content(tone(2), rate=8000), content(channels(0.5, 0.5))):
        with pytest.raises(BadFileError, match="want 32000 frames, mono, at 16000 Hz; got"):
            exactly(other, sample_rate=RATE, samples=SAMPLES)


# Nothing of libsndfile's callbacks reaches the terminal


def test_places_that_do_not_exist_and_failing_disks_are_no_exceptions(tmp_path):
    class Broken(io.BytesIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    guard = _Guard(io.BytesIO(b"abcdef"))
    assert guard.seek(4) == 4
    assert guard.seek(-5) == guard.seek(-9, io.SEEK_END) == guard.seek(-9, io.SEEK_CUR) == 4
    assert guard.read(9) == b"ef"
    assert guard.seek(1 << 62) == guard.tell() == 1 << 62
    assert guard.read(1) == b""
    broken = _Guard(Broken(b"abc"))
    assert broken.read(2) == b""
    assert broken.error is not None


def test_a_failing_disk_is_the_reason(tmp_path, monkeypatch):
    whole = content(tone())

    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() >= 44:
                raise OSError(5, "Input/output error")
            return super().read(size)

    monkeypatch.setattr(Path, "open", lambda *_: Failing(whole))
    with pytest.raises(BadFileError, match=r"^unreadable \(Input/output error\)$"):
        heard(tmp_path / "a.wav")


@pytest.mark.parametrize("format", ["W64", "MP3", "OGG", "AIFF"])
def test_damaged_files_print_nothing_of_python(tmp_path, monkeypatch, capsys, format):
    if format not in soundfile.available_formats():
        pytest.skip(f"this libsndfile writes no {format}")
    caught: list[object] = []
    monkeypatch.setenv("PATH", "")  # FFmpeg would have its say
    monkeypatch.setattr(sys, "unraisablehook", caught.append)
    whole = content(tone(rate=44_100), format, rate=44_100)
    damaged = bytearray(whole)
    if format == "W64":  # a size that leads beyond what a disk can hold
        at = whole.index(b"data")
        struct.pack_into("<Q", damaged, at + 16, (1 << 63) - 1)
    file = tmp_path / "a"
    rng = np.random.default_rng(0)
    for trial in range(40):
        file.write_bytes(damaged)
        try:
            assert heard(file).shape == (SAMPLES,)
        except BadFileError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert "0x" not in str(error)  # noqa: PT017
        damaged = bytearray(whole)
        for at in rng.integers(0, 300 if trial % 2 else len(whole), 4):
            damaged[at] = int(rng.integers(256))
        if trial % 3 == 0:
            del damaged[int(rng.integers(len(whole))) :]
    assert caught == []
    assert "Traceback" not in capsys.readouterr().err


# FFmpeg


@pytest.fixture
def strange(tmp_path, monkeypatch) -> Path:
    """A file that libsndfile cannot read, and a PATH on which there is nothing."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "-a b.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    return tmp_path / "-a b.m4a"


def test_without_ffmpeg_its_files_are_refused_with_that_advice(strange):
    with pytest.raises(BadFileError, match=r"unreadable without FFmpeg \(.+\): .* install FFmpeg"):
        heard(strange)


@pytest.mark.skipif(os.name != "posix", reason="stands in for FFmpeg with a shell script")
@pytest.mark.parametrize(
    ("script", "says"), [("", None), ("exit 1", "not of this world"), ("exec sleep 9", "not done")]
)
def test_with_ffmpeg_they_are_read(strange, tmp_path, monkeypatch, script, says):
    (tmp_path / "sound.wav").write_bytes(wave(0xFFFFFFFF, 0xFFFFFFFF))
    program = tmp_path / "bin" / "ffmpeg"
    program.write_text(
        f"#!/bin/sh\nPATH=/bin:/usr/bin\nprintf '%s\\n' \"$@\" > '{tmp_path}/said'\necho 'not of this world' >&2\n"
        f"{script}\nexec cat '{tmp_path}/sound.wav'\n"
    )
    program.chmod(0o755)
    if says is None:
        np.testing.assert_allclose(heard(strange)[:RATE], tone(), atol=1e-4)
    else:
        monkeypatch.setattr("mars.data.decode._PATIENCE", 5 if "world" in says else 0.5)
        with pytest.raises(BadFileError, match=says):
            heard(strange)
    asked = (tmp_path / "said").read_text().splitlines()
    assert asked[asked.index("-i") + 1] == f"file:{strange}"  # never an option or a protocol
    assert asked[asked.index("-protocol_whitelist") + 1] == "file"


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="FFmpeg is not installed")
@pytest.mark.parametrize("codec", ["aac", "alac"])
def test_the_real_ffmpeg(tmp_path, codec):
    (tmp_path / "a.wav").write_bytes(content(tone(1, rate=44_100), rate=44_100))
    made = ["ffmpeg", "-v", "error", "-i", "a.wav", "-c:a", codec, "-strict", "experimental", "a.m4a"]
    if subprocess.run(made, cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip(f"this FFmpeg does not write {codec}")
    sound = decode(tmp_path / "a.m4a", sample_rate=RATE, samples=SAMPLES)
    assert level(sound.audio) == pytest.approx(0.5, abs=0.05)
    assert sound.changes == {"padded", "resampled"}
    (tmp_path / "list.m4a").write_text("#EXTM3U\n#EXTINF:1,\na.wav\n")  # it would open another file
    for damaged in (tmp_path / "list.m4a", tmp_path / "text.wav"):
        damaged.touch()
        with pytest.raises(BadFileError, match="unreadable"):
            heard(damaged)
