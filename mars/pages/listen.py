"""A page to listen to a folder of notes: players, pictures with axes, a filter, and keys to step through them.

It lies beside the sounds and links to them. Its one script is this package's own, and the page's policy lets no other
run: a name that smuggled one in would not get to.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any
from urllib.parse import quote

from mars.labels import note_name
from mars.pages import html
from mars.pages.charts import Axis
from mars.pages.picture import Frequency, height_of

FREQUENCY: Frequency = "log"  # of the pictures
SIZE = 192, 256  # pixels of a picture, height and width, at most
# Where the picture is in its axes; page.css has the same as percentages.
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BELOW = 320, 226, 46, 8, 14, 26


@dataclass(frozen=True)
class Sound:
    """What a page shows of one sound."""

    file: str  # path from the page, or a source that holds its data
    picture: str
    title: str
    family: str | None = None
    pitch: int | None = None
    detail: str = ""


def render(
    title: str,
    known: Mapping[str, Any],
    sounds: Sequence[Sound],
    *,
    seconds: float,
    khz: float,
    bins: int,
    footer: str,
    originals: Sequence[Sound] = (),
) -> str:
    """Return the page as HTML.

    Args:
        known: facts at its top.
        seconds, khz: of a picture, from edge to edge; bins: of its spectrogram.
        originals: sounds that the others were made of, shown first and never filtered away.
        footer: plain text.
    """
    script = resources.files("mars.pages").joinpath("listen.js").read_text(encoding="utf-8")
    parts = [
        f"<header><h1>{escape(title)}</h1>{html.facts(known)}</header>",
        f'<svg class="hidden" aria-hidden="true"><symbol id="axes" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f"{_axes(seconds, khz, bins)}</symbol></svg>",
        html.section("Made of", "listen", "".join(map(_figure, originals))),
        f"<section><h2>{len(sounds):,} notes</h2>{_filter(sounds)}"
        f'<div class="listen" id="notes">{"".join(map(_figure, sounds))}</div></section>',
        f"<script>{script}</script>",
    ]
    run = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return html.document(title, parts, escape(footer), script=f"'sha256-{run}'")


def _figure(sound: Sound) -> str:
    """Return the picture, axes and player of a sound."""
    family = "" if sound.family is None else f' data-family="{escape(sound.family)}"'
    pitch = "" if sound.pitch is None else f' data-pitch="{sound.pitch}"'
    detail = f"<small>{escape(sound.detail)}</small>" if sound.detail else ""
    return (
        f'<figure class="note" tabindex="-1"{family}{pitch}><div class="plot"><svg aria-hidden="true">'
        f'<use href="#axes"/></svg><img src="{escape(_link(sound.picture))}" loading="lazy" '
        f'alt="Spectrogram: {escape(sound.title)}"></div><audio controls preload="none" '
        f'src="{escape(_link(sound.file))}" aria-label="Listen: {escape(sound.title)}"></audio>'
        f"<figcaption>{escape(sound.title)}{detail}</figcaption></figure>"
    )


def _link(source: str) -> str:
    return source if source.startswith("data:") else quote(source)


def _filter(sounds: Iterable[Sound]) -> str:
    """Return the selects that choose among the sounds, without those that have nothing to choose."""
    families = sorted({sound.family for sound in sounds if sound.family is not None})
    pitches = sorted({sound.pitch for sound in sounds if sound.pitch is not None})
    parts = []
    if len(families) > 1:
        parts.append(_select("family", "Family", ["all", *families], ["", *families], 0))
    if len(pitches) > 1:
        names = [f"{note_name(pitch)} ({pitch})" for pitch in pitches]
        parts.append(_select("lowest", "Lowest pitch", names, pitches, 0))
        parts.append(_select("highest", "Highest pitch", names, pitches, len(pitches) - 1))
    keys = "<kbd>→</kbd> <kbd>←</kbd> next and previous, <kbd>space</kbd> play and stop"
    return f'<div class="filter">{"".join(parts)}<output id="shown"></output><span class="help">{keys}</span></div>'


def _select(name: str, label: str, texts: Sequence[str], values: Sequence[Any], chosen: int) -> str:
    options = "".join(
        f'<option value="{escape(str(value))}"{" selected" if i == chosen else ""}>{escape(text)}</option>'
        for i, (text, value) in enumerate(zip(texts, values, strict=True))
    )
    return f'<label>{label} <select id="{name}">{options}</select></label>'


def _axes(seconds: float, khz: float, bins: int) -> str:
    """Return the ticks and names of the axes around a picture."""
    bottom, right = _HEIGHT - _BELOW, _WIDTH - _RIGHT
    x = Axis(0, seconds, _LEFT, right)
    parts = []
    for tick in (ticks := x.ticks(5)):
        parts.append(f'<path class="axis" d="M{x(tick):.1f} {bottom}v4"/>')
        name = f"{tick:g}{' s' if tick == ticks[-1] else ''}"
        parts.append(f'<text class="middle" x="{x(tick):.1f}" y="{bottom + 17}">{name}</text>')
    for tick in (ticks := _octaves(khz)):
        y = bottom - height_of(tick / khz, bins, FREQUENCY) * (bottom - _TOP)
        parts.append(f'<path class="axis" d="M{_LEFT - 4} {y:.1f}h4"/>')
        name = f"{tick:g}{' kHz' if tick == ticks[-1] else ''}"
        parts.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{name}</text>')
    return f'<g class="ticks">{"".join(parts)}</g>'


def _octaves(khz: float) -> list[float]:
    """Return 0, and the frequencies an octave apart up to the highest, kHz."""
    return [0.0, *(khz / 2**octave for octave in range(5, -1, -1))]
