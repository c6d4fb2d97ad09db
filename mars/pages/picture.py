"""Pictures of spectrograms, as PNG, with nothing but numpy and zlib.

Pictures are uint8 arrays (height, width, 3), sRGB. Low frequencies are at the bottom.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mars.files import write_atomically
from mars.pages.charts import Axis

Picture = NDArray[np.uint8]
Spectrogram = NDArray[np.floating] | Tensor  # a tensor must be on the CPU
Frequency = Literal["linear", "log"]

# Nine even samples of matplotlib's magma (CC0): its lightness grows evenly, so equal steps of dB look equal.
_ANCHORS = (0x000004, 0x1D1147, 0x51127C, 0x832681, 0xB73779, 0xE75263, 0xFC8961, 0xFEC488, 0xFCFDBF)
_BACKGROUND = (18, 18, 24)
_TEXT = (214, 214, 222)
_GAP = 6  # pixels between the pictures of a sheet
_LEFT, _BELOW = 40, 14  # pixels for the axes of a sheet

# Five columns a glyph, one byte a column, the least significant bit on top.
_GLYPHS = {
    "0": "3e5149453e", "1": "00427f4000", "2": "4261514946", "3": "2141454b31", "4": "1814127f10",
    "5": "2745454539", "6": "3c4a494930", "7": "0171090503", "8": "3649494936", "9": "064949291e",
    "a": "2054545478", "b": "7f48444438", "c": "3844444420", "d": "384444487f", "e": "3854545418",
    "f": "087e090102", "g": "0c5252523e", "h": "7f08040478", "i": "00447d4000", "j": "2040443d00",
    "k": "7f10284400", "l": "00417f4000", "m": "7c04180478", "n": "7c08040478", "o": "3844444438",
    "p": "7c14141408", "q": "081414187c", "r": "7c08040408", "s": "4854545420", "t": "043f444020",
    "u": "3c4040207c", "v": "1c2040201c", "w": "3c4030403c", "x": "4428102844", "y": "0c5050503c",
    "z": "4464544c44", "-": "0808080808", "_": "4040404040", ".": "0060600000", "#": "147f147f14",
    " ": "0000000000",
}  # fmt: skip
_UNKNOWN = "7f4141417f"  # a box
_LINEAR = 10  # the bin below which a logarithmic axis is linear: bins there would else be many pixels high


def png(picture: Picture) -> bytes:
    """Encode a picture (height, width, 3) as PNG."""
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
        raise ValueError(f"png: want uint8 (height, width, 3), got {picture.dtype} {picture.shape}")
    height, width, _ = picture.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row starts with its filter, 0: none
    rows[:, 1:] = picture.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write_png(path: Path | str, picture: Picture) -> None:
    """Write a picture (height, width, 3) as a PNG; the file appears whole or not at all."""
    write_atomically(Path(path), png(picture))


def spectrogram_picture(
    spectrogram: Spectrogram,
    *,
    frequency: Frequency = "linear",
    height: int | None = None,
    width: int | None = None,
) -> Picture:
    """Return the picture of a spectrogram (bins, frames) in [-1, 1], black to pale yellow; NaN is -1.

    frequency: "log" gives every octave above bin 10 or so the same height, so that harmonics make the same
    pattern at every pitch. height, width: pixels; at most, and unless given, the bins and frames there are.
    Several bins or frames under one pixel are averaged.
    """
    spectrogram = np.asarray(spectrogram)
    if spectrogram.ndim != 2 or not spectrogram.size:
        raise ValueError(f"spectrogram_picture: want (bins, frames), got shape {spectrogram.shape}")
    bins, frames = spectrogram.shape
    if frequency not in ("linear", "log"):
        raise ValueError(f"spectrogram_picture: frequency must be linear or log, got {frequency!r}")
    rows, columns = min(height or bins, bins), min(width or frames, frames)
    if rows < 1 or columns < 1:
        raise ValueError(f"spectrogram_picture: height and width must be positive, got {height}, {width}")
    edges = np.linspace(0, bins, rows + 1)
    if frequency == "log":
        edges = np.minimum(_LINEAR * np.sinh(np.linspace(0, np.arcsinh(bins / _LINEAR), rows + 1)), bins)
    x = np.nan_to_num(spectrogram.astype(np.float64), nan=-1.0).clip(-1, 1)
    x = _averaged(x, edges)
    x = _averaged(x.T, np.linspace(0, frames, columns + 1)).T
    return _colours()[np.rint((x[::-1] + 1) * 127.5).astype(np.int64)]


def height_of(share: float, bins: int, frequency: Frequency = "linear") -> float:
    """Return how high in a picture a frequency is drawn, 0 (its bottom) to 1, as `spectrogram_picture` does it.

    share: of the highest frequency of the spectrogram, 0 to 1. bins: of the spectrogram.
    """
    return share if frequency == "linear" else math.asinh(share * bins / _LINEAR) / math.asinh(bins / _LINEAR)


def contact_sheet(
    spectrograms: Spectrogram,
    labels: Sequence[str] | None = None,
    *,
    columns: int = 8,
    frequency: Frequency = "linear",
    height: int | None = None,
    width: int | None = None,
    extent: tuple[float, float] | None = None,
) -> Picture:
    """One picture of many spectrograms (N, bins, frames), in reading order, each above its label.

    Labels are drawn in lower case and cut to the width. extent: seconds across a spectrogram and kHz up it, for axes
    along the sheet's left and lower edge. Other arguments are as for `spectrogram_picture`.
    """
    spectrograms = np.asarray(spectrograms)
    if spectrograms.ndim != 3 or not len(spectrograms):
        raise ValueError(f"contact_sheet: want (N, bins, frames), N > 0; got shape {spectrograms.shape}")
    if columns < 1:
        raise ValueError(f"contact_sheet: want columns >= 1, got {columns}")
    if labels is not None and len(labels) != len(spectrograms):
        raise ValueError(f"contact_sheet: {len(spectrograms)} spectrograms but {len(labels)} labels")
    tiles = [spectrogram_picture(s, frequency=frequency, height=height, width=width) for s in spectrograms]
    tile_height, tile_width, _ = tiles[0].shape
    caption = 0 if labels is None else 11  # 7 of text, 3 above, 1 below
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    step_y, step_x = tile_height + caption + _GAP, tile_width + _GAP
    left, below = (0, 0) if extent is None else (_LEFT, _BELOW)
    sheet = np.empty((rows * step_y + _GAP + below, left + columns * step_x + _GAP, 3), np.uint8)
    sheet[:] = _BACKGROUND
    for index, tile in enumerate(tiles):
        y, x = _GAP + index // columns * step_y, left + _GAP + index % columns * step_x
        sheet[y : y + tile_height, x : x + tile_width] = tile
        if labels is not None:
            _write(sheet[:, : x + tile_width], labels[index], y + tile_height + 3, x)
    if extent is not None:
        seconds, khz = extent
        for tick in (ticks := Axis(0, khz, 0, 1).ticks(4)):
            up = height_of(tick / khz, np.asarray(spectrograms).shape[1], frequency)
            name = f"{tick:g}{' khz' if tick == ticks[-1] else ''}"
            for top in range(_GAP, rows * step_y, step_y):
                y = top + round((1 - up) * (tile_height - 1))
                sheet[y, left + 1 : left + _GAP - 1] = _TEXT
                _write(sheet, name, min(max(y - 3, 0), top + tile_height - 7), left - 6 * len(name))
        for tick in (ticks := Axis(0, seconds, 0, 1).ticks(max(tile_width // 40, 1))):
            name = f"{tick:g}{' s' if tick == ticks[-1] else ''}"
            for start in range(left + _GAP, left + columns * step_x, step_x):
                x = start + round(tick / seconds * (tile_width - 1))
                sheet[rows * step_y + 1 : rows * step_y + 5, x] = _TEXT
                _write(sheet, name, rows * step_y + 7, min(x, start + tile_width - 6 * len(name)))
    return sheet


def _write(sheet: Picture, text: str, top: int, left: int) -> None:
    """Draw a line of text, cut at the sheet's right edge."""
    pixels = _text(text)[:, : max(sheet.shape[1] - left, 0)]
    sheet[top : top + 7, left : left + pixels.shape[1]][pixels] = _TEXT


def _averaged(x: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the means of x (n, m) over the intervals between edges in [0, n], ends in part: (len(edges) - 1, m)."""
    integral = np.concatenate([np.zeros((1, x.shape[1])), x.cumsum(0)])
    whole = np.minimum(edges.astype(np.int64), len(x) - 1)
    at_edges = integral[whole] + (edges - whole)[:, None] * x[whole]
    means: NDArray[np.float64] = np.diff(at_edges, axis=0) / np.diff(edges)[:, None]
    return means.clip(-1, 1)


def _colours() -> Picture:
    """Return the colour map, uint8 (256, 3)."""
    anchors = np.array([[c >> 16, c >> 8 & 255, c & 255] for c in _ANCHORS])
    positions = np.linspace(0, 255, len(anchors))
    channels = [np.interp(np.arange(256), positions, anchors[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


def _text(text: str) -> NDArray[np.bool_]:
    """Return the pixels (7, 6 * length) of a line of text; a character without a glyph is a box."""
    codes = "".join(_GLYPHS.get(character, _UNKNOWN) + "00" for character in text.lower())
    columns = np.frombuffer(bytes.fromhex(codes), np.uint8)
    return np.unpackbits(columns[None], axis=0, bitorder="little")[:7].astype(bool)
