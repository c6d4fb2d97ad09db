"""Text from strangers."""

from __future__ import annotations

import os

import pytest

from mars.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    {
        "escape": ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        "C1": ("\x9b2J", r"\x9b2J"),
        "title": ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        "line": ("a\nb\rc\td", r"a\nb\rc\td"),
        "separators": ("a\u2028b\u2029c\x85", r"a\u2028b\u2029c\x85"),
        "turned round": ("rtl \u202egnp.wav\u2066", r"rtl \u202egnp.wav\u2066"),
        "delete": ("\x7f", r"\x7f"),
        "no UTF-8": (os.fsdecode(b"latin-\xe9.wav"), r"latin-\xe9.wav"),
        "lone surrogate": ("\ud800", r"\ud800"),
        "private": ("\ue000\U000f0000", r"\ue000\U000f0000"),
    }.values(),
)
def test_what_is_not_for_print_is_escaped(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        r"C:\notes",
        "[bold]x[/b]",
        "日本\u3000語",
        "cafe\u0301\u00a0x",
        "👩\u200d🎤",
        "\u0645\u06cc\u200c\u062e",
    ],
)
def test_what_is_for_print_stays(text):
    assert printable(text) == text


def test_whatever_the_text_it_is_one_printable_line():
    shown = printable("".join(map(chr, range(0x20000))))
    assert shown.encode()
    assert len(shown.splitlines()) == 1
    assert not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in shown)
