"""Text that others wrote, such as the names of files, made safe for a terminal and for one line of a file."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # in words of Persian and Hindi, and in emoji made of several
_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # they would reorder what follows


def printable(text: str) -> str:
    r"""Escape every unprintable character of text as Python does: `\x1b`, `\n`, `\u202e`.

    So no name can move the cursor, colour what follows, start a line or turn it round. Spaces of all kinds and the
    joiners of letters stay; a byte of a file's name that is no UTF-8 shows as `\xe9`.
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs":
        return character
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte that is no UTF-8
        return rf"\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def is_one_line(name: str) -> bool:
    """Return whether text is one plain line: no control characters, line ends or changes of direction."""
    return not any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in _TURNS for c in name
    )
