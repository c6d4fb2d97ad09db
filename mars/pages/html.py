"""Pages without network and, but for `listen`, without script.

Here are their frame and style sheet, and the words, sounds and tables in them.

Nothing here needs PyTorch. Strings that are not said to be HTML are escaped.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mars.files import write_atomically

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# A name that smuggled a script in must not get to run it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data: file:; media-src 'self' data: file:"


def document(title: str, parts: Iterable[str], footer: str, script: str = "") -> str:
    """Return a page of HTML parts, without the empty ones, above a footer in HTML.

    script: source of scripts that may run, as a policy names it; none otherwise.
    """
    policy = f"{POLICY}; script-src {script}" if script else POLICY
    style = resources.files("mars.pages").joinpath("page.css").read_text(encoding="utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>\n{style}</style></head>\n<body>\n" + "\n".join(filter(None, parts)) + "\n"
        f"<footer>{footer}</footer>\n</body></html>\n"
    )


def write(path: Path, page: str) -> None:
    """Write a page; the file appears whole or not at all. Raises `OSError`."""
    write_atomically(path, page.encode("utf-8", "xmlcharrefreplace"))


def section(title: str, kind: str, content: str) -> str:
    """Return a section of a page with this class; content is HTML, and without any there is no section."""
    return f'<section><h2>{escape(title)}</h2><div class="{kind}">{content}</div></section>' if content else ""


def facts(known: Mapping[str, Any]) -> str:
    """Return a list of names and values, without those that are empty."""
    shown = [(name, escape(str(value))) for name, value in known.items() if value or value == 0]
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown) + "</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table of cells, HTML, that scrolls sideways where it is too wide; each row's first cell is its name."""
    of = f' class="{kind}"' if kind else ""
    top = "<thead><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr></thead>" if head else ""
    body = "".join(f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for name, *cells in rows)
    return f'<div class="scroll"><table{of}>{top}<tbody>{body}</tbody></table></div>'


def note(picture: str, sound: str, spoken: str, label: str, caption: str) -> str:
    """Return a note's picture and player. picture, sound: sources; spoken, label: their texts for screen readers."""
    return (
        f'<figure><img src="{escape(picture)}" loading="lazy" alt="{escape(spoken)}">'
        f'<audio controls preload="metadata" src="{escape(sound)}" aria-label="{escape(label)}"></audio>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def markdown(text: str) -> str:
    """A text in Markdown as HTML, without a header between lines of `---`; HTML in it is shown as text."""
    from markdown_it import MarkdownIt

    if text.startswith("---\n") and (end := text.find("\n---\n", 3)) > 0:
        text = text[end + 5 :]
    return str(MarkdownIt("js-default").render(text))


def data_uri(kind: str, data: bytes) -> str:
    """Return a data URI. kind: a MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def flac(samples: NDArray[np.int16], rate: int) -> bytes:
    """Encode samples (n,) as FLAC, which is about half as long as WAV and which every browser plays."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def number(value: float, digits: int = 4) -> str:
    """Format a number with at most so many digits, or all those before the point."""
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 2}e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Format a duration, such as 45 s, 12 min, 3 h 20 min or 6 d 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted names."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flat(value, f"{where}{name}.") if isinstance(value, Mapping) else {f"{where}{name}": value}
    return result


def text(value: Any) -> str:
    """Format a value as in JSON, but without quotes around a string."""
    return value if isinstance(value, str) else json.dumps(value)
