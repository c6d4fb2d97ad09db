"""MP3 files without a header that counts their frames, with a wrong one, with tags, joined."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile

from mars.data import mpeg
from mars.data.decode import decode
from mars.errors import BadFileError

RATE = 44_100
FRAME = b"\xff\xfb\x90\xc4" + bytes(413)  # MPEG 1 layer III, 128 kbit/s, 44.1 kHz, mono; silence
LOUD = b"\xff\xfb\xa0\xc4" + bytes(518)  # 160 kbit/s
STEREO, SLOW = b"\xff\xfb\x90\x04" + bytes(413), b"\xff\xfb\x94\xc4" + bytes(380)  # 48 kHz
ID3V2 = b"ID3\x04\0\0\0\0\x01\x00" + b"\xff\xfb\x90\xc4" * 32
ID3V1, APE = b"TAG" + bytes(125), b"APETAGEX" + struct.pack("<IIII", 2000, 32, 0, 0) + bytes(8)

needs_mp3 = pytest.mark.skipif("MP3" not in soundfile.available_formats(), reason="this libsndfile writes no MP3")


def xing(count: int, name: bytes = b"Xing") -> bytes:
    frame = bytearray(FRAME)
    frame[21:25] = name
    struct.pack_into(">II", frame, 25, 1, count)
    return bytes(frame)


def counts(content: bytes) -> list[int]:
    """What the header of each stream says that follows, once that it does is checked."""
    found = []
    for stream in mpeg.streams(content):
        assert stream[21:25] in (b"Xing", b"Info")
        flags, count = struct.unpack_from(">II", stream, 25)
        assert flags & 1
        found.append(count)
    return found


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (FRAME * 5, [5]),
        ((FRAME + LOUD) * 3, [6]),
        (xing(5) + FRAME * 5, [5]),
        (xing(2) + FRAME * 5, [5]),
        (xing(2, b"Info") + FRAME * 5, [5]),
        (xing(9) + FRAME * 5, [9]),  # cut short, and the decoder is to find that
        (ID3V2 + xing(5) + FRAME * 5 + ID3V1, [5]),
        (b"junk" * 100 + FRAME * 5 + APE + ID3V1, [5]),
        (xing(5) + FRAME * 5 + xing(3) + FRAME * 3, [5, 3]),
        (xing(5) + FRAME * 5 + ID3V1 + ID3V2 + xing(3) + FRAME * 3, [5, 3]),
        (xing(5) + FRAME * 5 + bytes(999) + xing(3) + FRAME * 3, [5, 3]),
        (xing(2) + FRAME * 2 + ID3V1 + LOUD * 3, [5]),
        (FRAME * 5 + FRAME[:100], [5]),
        ((FRAME[:36] + b"VBRI" + FRAME[40:]) + FRAME * 5, [5]),
        (b"", []),
        (b"\xff\xfb" * 1000, []),
        (bytes(5000), []),
        (b"ID3\x04\0\0\0\0\0\0fLaC" + bytes(100), []),
        (b"ID3", []),
    ],
)
def test_every_frame_is_counted(content, wanted):
    assert counts(content) == wanted


def test_a_whole_file_stays_as_it_is():
    content = xing(5) + FRAME * 5
    assert mpeg.streams(content) == [content]


def test_the_size_of_a_file_without_its_tags_is_put_right():
    head = bytearray(xing(3))
    struct.pack_into(">III", head, 25, 3, 3, 12345)
    (stream,) = mpeg.streams(ID3V2 + bytes(head) + FRAME * 3)
    assert struct.unpack_from(">I", stream, 33) == (len(stream),)


@pytest.mark.parametrize("other", [STEREO, SLOW])
def test_joined_files_of_different_kinds_are_refused(other):
    with pytest.raises(BadFileError, match="different rates or channels"):
        mpeg.streams(FRAME * 5 + other * 5)


def test_what_is_lost_in_the_middle_is_not_passed_over():
    with pytest.raises(BadFileError, match="damaged: 100 bytes in its middle"):
        mpeg.streams(FRAME * 5 + FRAME[:100] + FRAME[1:] + b"x" + FRAME * 5)


def mp3(hertz: float, *, header: bool = True) -> bytes:
    """A second of noise, which takes a high bit rate, and two of a tone, which do not."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, RATE)
    tone = 0.3 * np.sin(2 * np.pi * hertz * np.arange(2 * RATE) / RATE)
    file = io.BytesIO()
    soundfile.write(file, np.concatenate([noise, tone]), RATE, format="MP3", bitrate_mode="VARIABLE")
    content = file.getvalue()
    first = mpeg._header(content, 0)
    assert first is not None
    assert content[first.tag : first.tag + 4] == b"Xing"
    return content if header else content[first.length :]


def hertz(audio: np.ndarray, second: float) -> float:
    """The strongest frequency of half a second at 16 kHz that begins there."""
    part = audio[int(second * 16_000) :][:8000] * np.hanning(8000)
    return 2.0 * float(np.abs(np.fft.rfft(part)).argmax())


@needs_mp3
@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_a_variable_rate_without_a_header_is_heard_to_its_end(tmp_path, kind):
    content = mp3(440, header=False)
    (tmp_path / "a.mp3").write_bytes(content)
    source = content if kind == "bytes" else tmp_path / "a.mp3"
    sound = decode(source, sample_rate=16_000, samples=64_000)
    assert hertz(sound.audio, 2.4) == pytest.approx(440, abs=2)
    assert np.abs(sound.audio[32_000:46_000]).max() == pytest.approx(0.3, abs=0.03)
    assert sound.changes == {"padded", "resampled"}


@needs_mp3
@pytest.mark.parametrize("headers", [(True, True), (False, False), (True, False), (False, True)])
def test_of_joined_files_all_are_heard(headers):
    content = b"".join(mp3(f, header=header) for f, header in zip((440, 880), headers, strict=True))
    sound = decode(content, sample_rate=16_000, samples=6 * 16_000)
    assert hertz(sound.audio, 2) == pytest.approx(440, abs=2)
    assert hertz(sound.audio, 5) == pytest.approx(880, abs=2)


@needs_mp3
def test_a_file_that_ends_early_is_cut_short():
    content = mp3(440)
    cut = content[: len(content) // 2]
    with pytest.raises(BadFileError, match="cut short"):
        decode(cut, sample_rate=16_000, samples=64_000)
    assert decode(cut, sample_rate=16_000, samples=8000).changes == {"cut", "resampled"}
