"""Pages that mars writes, as tests read them."""

from __future__ import annotations

import base64
import io
import struct
import urllib.parse
import zlib
from html.parser import HTMLParser
from pathlib import Path

import soundfile


class Page(HTMLParser):
    """A page, parsed and checked: well formed, nothing from outside, every source what it says it is."""

    EMPTY = ("meta", "img", "link", "br", "circle", "path", "rect")

    def __init__(self, text: str, samples: int, folder: Path | None = None) -> None:
        """text: of the page; samples: of every sound in it; folder: what it may link to the files of."""
        super().__init__()
        self.samples, self.folder, self.text = samples, folder, text
        self.open, self.tags, self.texts, self.alts, self.sources = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        assert self.text.startswith("<!DOCTYPE html>")
        assert {"script", "iframe", "object", "link", "base", "form"}.isdisjoint(self.tags)
        assert "http:" not in self.text
        assert "https:" not in self.text
        assert "url(" not in self.text
        assert "@import" not in self.text

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("href", "srcset", "style") for name in given)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "img":
            assert given["alt"]
            self.alts.append(given["alt"])
        if tag in ("svg", "audio"):
            assert given["aria-label"]
        if "src" in given:
            self.sources.append(given["src"])
            self.check_source(given["src"])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def check_source(self, source: str) -> None:
        if not source.startswith("data:"):
            assert self.folder is not None
            path = self.folder / urllib.parse.unquote(source)
            assert path.is_file()
            assert path.resolve().is_relative_to(self.folder.resolve())
            return
        kind, _, data = source.partition(";base64,")
        data = base64.b64decode(data, validate=True)
        if kind == "data:image/png":
            assert data.startswith(b"\x89PNG\r\n\x1a\n")
            width, height = struct.unpack(">II", data[16:24])
            length = struct.unpack(">I", data[33:37])[0]
            assert len(zlib.decompress(data[41 : 41 + length])) == height * (1 + 3 * width)
        else:
            assert kind == "data:audio/flac"
            waveform, rate = soundfile.read(io.BytesIO(data), dtype="int16")
            assert len(waveform) == self.samples
            assert rate == 16_000
