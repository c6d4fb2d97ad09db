"""Pictures: what is written decodes to the same pixels, and the geometry is the documented one."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from mars.pages.picture import contact_sheet, height_of, spectrogram_picture, write_png


def decoded(path: Path) -> np.ndarray:
    """Pixels of a PNG of 8-bit RGB without row filters, every checksum verified."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(kind + body),)
        chunks.append((kind, body))
        at += 12 + length
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 2, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[1][1]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 33)], ids=str)
def test_png_holds_the_pixels(tmp_path, shape):
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    path = tmp_path / "a.png"
    write_png(path, picture)
    assert np.array_equal(decoded(path), picture)
    assert list(tmp_path.iterdir()) == [path]
    write_png(path, picture[:, ::-1])  # over an old file, from a strided array
    assert np.array_equal(decoded(path), picture[:, ::-1])


def test_low_frequencies_are_at_the_bottom_and_louder_is_lighter():
    picture = spectrogram_picture(np.linspace(-1, 1, 200)[:, None].repeat(3, axis=1))
    assert picture.shape == (200, 3, 3)
    assert picture[-1, 0].tolist() == [0, 0, 4]
    assert picture[0, 0].tolist() == [0xFC, 0xFD, 0xBF]
    lightness = picture[::-1, 0] @ np.array([0.2126, 0.7152, 0.0722])
    assert np.all(np.diff(lightness) > -0.3)


def test_shrinking_averages():
    x = np.random.default_rng(0).uniform(-1, 1, (12, 9))
    got = spectrogram_picture(x, height=4, width=3)
    means = x.reshape(4, 3, 3, 3).mean(axis=(1, 3))
    assert np.array_equal(got, spectrogram_picture(means))
    assert spectrogram_picture(x, height=5, width=100).shape == (5, 9, 3)  # never enlarged


def test_log_axis_gives_octaves_the_same_height():
    rows = []
    for bin_ in (64, 128, 256):
        x = np.full((512, 1), -1.0)
        x[bin_] = 1
        rows.append(int(spectrogram_picture(x, frequency="log")[:, 0].sum(-1).argmax()))
    assert rows[0] - rows[1] == pytest.approx(rows[1] - rows[2], abs=2)
    flat = spectrogram_picture(np.full((512, 4), 0.3), frequency="log", height=100)
    assert np.array_equal(flat, np.broadcast_to(flat[0, 0], flat.shape))


def test_tensors_and_values_out_of_range():
    x = torch.tensor([[-5.0, float("nan")], [5.0, 0.0]])
    expected = spectrogram_picture(np.array([[-1.0, -1.0], [1.0, 0.0]]))
    assert np.array_equal(spectrogram_picture(x), expected)
    assert np.array_equal(spectrogram_picture(x.half()), expected)


def test_sheet_geometry():
    x = np.linspace(-1, 1, 5 * 20 * 30).reshape(5, 20, 30)
    plain = contact_sheet(x, columns=3)
    assert plain.shape == (6 + 2 * 26, 6 + 3 * 36, 3)
    for i in range(5):
        top, left = 6 + i // 3 * 26, 6 + i % 3 * 36
        assert np.array_equal(plain[top : top + 20, left : left + 30], spectrogram_picture(x[i]))
    assert np.array_equal(plain[-20:, -20:], np.broadcast_to(plain[0, 0], (20, 20, 3)))  # the empty place
    assert contact_sheet(x[:2], columns=8).shape == (6 + 26, 6 + 2 * 36, 3)


def test_labels_are_drawn_below_and_nowhere_else():
    x = np.zeros((2, 20, 30))
    blank = contact_sheet(x, ["", ""])
    labelled = contact_sheet(x, ["a-60", "g#_.0123456789"])
    assert labelled.shape == blank.shape == (6 + 20 + 11 + 6, 6 + 2 * 36, 3)
    changed = (labelled != blank).any(-1)
    assert changed[26:37, 6:36].any()
    assert changed[26:37, 42:72].any()
    changed[26:37, 6:36] = changed[26:37, 42:72] = False
    assert not changed.any()
    assert np.array_equal(contact_sheet(x, ["A", "b"]), contact_sheet(x, ["a", "B"]))


def test_axes_lie_outside_the_pictures():
    x = np.linspace(-1, 1, 3 * 60 * 80).reshape(3, 60, 80)
    plain, drawn = contact_sheet(x, columns=2), contact_sheet(x, columns=2, extent=(4.0, 8.0))
    left, below = drawn.shape[1] - plain.shape[1], drawn.shape[0] - plain.shape[0]
    assert left > 0
    assert below > 0
    assert np.array_equal(drawn[: -below - 6, left + 6 :], plain[:-6, 6:])
    for top in (6, 6 + 66):  # kHz beside each row
        assert (drawn[top : top + 60, :left] != plain[0, 0]).any()
    for start in (left + 6, left + 6 + 86):  # seconds below each column
        assert (drawn[-below:, start : start + 80] != plain[0, 0]).any()
    assert not np.array_equal(drawn, contact_sheet(x, columns=2, extent=(10.0, 8.0)))


@pytest.mark.parametrize("frequency", ["linear", "log"])
def test_a_frequency_is_drawn_where_the_axis_says(frequency):
    x = np.full((512, 4), -1.0)
    x[128] = 1.0  # a quarter of the way up to the highest
    row = int(spectrogram_picture(x, frequency=frequency)[:, 0].sum(-1).argmax())
    assert height_of(0.25, 512, frequency) == pytest.approx(1 - (row + 0.5) / 512, abs=0.005)


def test_every_character_looks_different():
    def drawn(text: str) -> bytes:
        return contact_sheet(np.zeros((1, 20, 30)), [text]).tobytes()

    characters = "0123456789abcdefghijklmnopqrstuvwxyz-_.# é"
    assert len({drawn(c) for c in characters}) == len(characters)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: write_png("a.png", np.zeros((2, 2), np.uint8)), r"want uint8 \(height, width, 3\)"),
        (lambda: write_png("a.png", np.zeros((2, 2, 3))), "got float64"),
        (lambda: spectrogram_picture(np.zeros(4)), r"want \(bins, frames\)"),
        (lambda: spectrogram_picture(np.zeros((4, 4)), frequency="mel"), "must be linear or log, got 'mel'"),
        (lambda: spectrogram_picture(np.zeros((4, 4)), width=-1), "must be positive"),
        (lambda: contact_sheet(np.zeros((0, 4, 4))), "N > 0"),
        (lambda: contact_sheet(np.zeros((1, 4, 4)), columns=0), "columns >= 1"),
        (lambda: contact_sheet(np.zeros((2, 4, 4)), ["a"]), "2 spectrograms but 1 labels"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
