"""MP3 files as what they hold: runs of frames, each with a header that states how many there are.

Decoders learn the length of an MP3 from its first frame (Xing, later LAME), and guess where there is none. So a file of
variable bit rate without that frame is heard in part, and of files that were joined only the first.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from mars.errors import BadFileError

_MPEG1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # Hz, by version
_PREAMBLE = 1 << 16  # bytes before the first frame that may be anything
_COUNTS, _SIZED = 1, 2  # the flags of a Xing header that says how many frames there are, how many bytes


@dataclass(frozen=True, slots=True)
class _Header:
    """The four bytes that a frame begins with."""

    version: int  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    rate: int  # Hz
    mono: bool
    summed: bool  # two bytes of a check sum follow
    length: int  # bytes of the frame

    @property
    def sound(self) -> tuple[int, bool]:
        """What cannot change within a stream."""
        return self.rate, self.mono

    @property
    def tag(self) -> int:
        """Where a Xing header is in its frame: after the side information, which is zeros there."""
        return 4 + 2 * self.summed + ((17 if self.mono else 32) if self.version == 3 else (9 if self.mono else 17))


@dataclass(slots=True)
class _Stream:
    """A run of frames; `xing` is the frame before them that is no sound, or empty."""

    header: _Header
    xing: bytes
    frames: list[bytes] = field(default_factory=list)


def streams(content: bytes) -> list[bytes]:
    """Return the MP3 streams that a file joins, without tags, each beginning with a header that counts its frames.

    Empty for what is no MPEG layer III. A header that claims more frames than there are is left as it is, so that the
    decoder finds the stream cut short.

    Raises:
        BadFileError: it joins sounds of different rates or channels, or holds something else in between.
    """
    result: list[_Stream] = []
    at = 0
    while (start := _next_frame(content, at, result[0].header if result else None)) is not None:
        if result and content[at:start].strip(b"\0"):
            raise BadFileError(f"damaged: {start - at:,} bytes in its middle are no MP3; repair or convert it")
        at = start
        while (header := _header(content, at)) is not None and at + header.length <= len(content):
            frame = content[at : at + header.length]
            at += header.length
            xing = frame[header.tag : header.tag + 4] in (b"Xing", b"Info")
            other = frame[36:40] == b"VBRI"  # the same of another maker, which few decoders heed
            if result and header.sound != result[0].header.sound:
                raise BadFileError("it joins MP3s of different rates or channels; convert it to WAV or FLAC")
            if xing or other or not result:
                result.append(_Stream(header, frame if xing else b""))
            if not (xing or other):
                result[-1].frames.append(frame)
        at = _after_tags(content, at)
    return [_counted(stream) + b"".join(stream.frames) for stream in result if stream.frames]


def _header(content: bytes, at: int) -> _Header | None:
    head = content[at : at + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:  # eleven bits of sync, layer III
        return None
    version, index, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or index in (0, 15) or rate == 3:
        return None
    hertz = _RATES[version][rate]
    kbits, spread = (_MPEG1[index], 144) if version == 3 else (_MPEG2[index], 72)
    length = spread * kbits * 1000 // hertz + (head[2] >> 1 & 1)
    return _Header(version, hertz, head[3] >> 6 == 3, not head[1] & 1, length)


def _next_frame(content: bytes, at: int, known: _Header | None) -> int | None:
    """Return the offset of the next frame that another of its kind, a tag or the end follows; None: there is none."""
    at = _after_tags(content, at)
    last = len(content) if known is not None else at + _PREAMBLE
    while (at := content.find(0xFF, at, last)) >= 0:
        header = _header(content, at)
        if header is not None and (known is None or header.version == known.version):
            after = at + header.length
            follower = _header(content, after)
            if follower is not None and follower.sound == header.sound:
                return at
            if after == len(content) or _after_tags(content, after) != after:
                return at
        at += 1
    return None


def _after_tags(content: bytes, at: int) -> int:
    """Return the offset after the ID3 and APE tags that begin at this one."""
    while True:
        if content.startswith(b"ID3", at) and len(content) >= at + 10:
            sizes = content[at + 6 : at + 10]
            size = sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(sizes))
            at += 10 + size + 10 * bool(content[at + 5] & 0x10)  # a footer
        elif content.startswith(b"TAG", at):
            at += 128
        elif content.startswith(b"APETAGEX", at) and len(content) >= at + 32:
            size, _, flags = struct.unpack_from("<III", content, at + 12)
            at += 32 + size if flags & 1 << 29 else 32  # a header, or a footer alone
        else:
            return at


def _counted(stream: _Stream) -> bytes:
    """Return the stream's Xing frame, which counts the others: its own one corrected, or a new one."""
    header, count = stream.header, len(stream.frames)
    if stream.xing:
        frame, tag = bytearray(stream.xing), header.tag
        (flags,) = struct.unpack_from(">I", frame, tag + 4)
        if flags & _SIZED:  # or decoders complain of the tags that are gone
            size = len(frame) + sum(map(len, stream.frames))
            struct.pack_into(">I", frame, tag + 8 + 4 * bool(flags & _COUNTS), size)
        if flags & _COUNTS:
            (claimed,) = struct.unpack_from(">I", frame, tag + 8)
            struct.pack_into(">I", frame, tag + 8, max(claimed, count))
            return bytes(frame)
    first = bytearray(stream.frames[0][:4])
    first[1] |= 1  # no check sum
    first[2] = 0x90 | first[2] & 0x0C | first[2] & 1  # 128 or 80 kbit/s, which has room
    info = _header(bytes(first), 0)
    assert info is not None
    frame = first + bytes(info.length - 4)
    struct.pack_into(">4sII", frame, info.tag, b"Info", _COUNTS, count)
    return bytes(frame)
