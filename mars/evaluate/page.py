"""A report as a page in one file, without network or script: figures, charts, and notes to see and hear.

Sounds and pictures are part of the file; pairs of notes beyond `EMBEDDED` bytes are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from mars import audio
from mars.config import AudioConfig
from mars.evaluate.report import Figure, Report, Sounds
from mars.evaluate.table import DIGITS, EVALUATED, Headings, absent, arrow, headings, measured, rows
from mars.pages import html
from mars.pages.charts import Bar, bar_chart
from mars.pages.html import number, section
from mars.pages.picture import png, spectrogram_picture

EMBEDDED = 8 << 20  # bytes of sounds and pictures, before base64 makes them a third longer
FRONT_END = AudioConfig()  # of the pictures: 16 kHz, 4 s
SIZE = 256, 256  # pixels of a picture, height and width, at most
LISTED = 100  # refused files that are listed
LONG = 300  # characters of a value that are shown

BETTER = {-1: "lower is better", 0: "", +1: "higher is better"}
PROFILES = {
    "standard": "For a number beside Table 1 of the paper evaluate in the profile <code>vinay2022</code>.",
    "vinay2022": "This profile repeats the statistics behind the published baselines, their flaws included: "
    "it is for a number beside Table 1 of the paper.",
}


@dataclass(frozen=True, eq=False)
class Pair:
    """A real note and what was made of it, or other notes that belong together."""

    title: str
    sounds: Mapping[str, Tensor]  # by what each is, such as "real" and "evaluated": (samples,) at 16 kHz, full scale 1


def write(path: Path, report: Report, pairs: Sequence[Pair]) -> None:
    """Write the page; the file appears whole or not at all.

    Raises:
        ValueError: a sound is no waveform (samples,), or holds NaN or infinity.
        OSError: the file cannot be written.
    """
    page = render(report, pairs)
    path.parent.mkdir(parents=True, exist_ok=True)
    html.write(path, page)


def render(report: Report, pairs: Sequence[Pair]) -> str:
    """Return the page as HTML; raises as `write` does."""
    title = f"Evaluation, {report.profile} profile, {report.mode}"
    known = headings(report)
    names = measured(rows(report).values(), known)
    parts = [
        f"<header><h1>{escape(title)}</h1>{_facts(report)}</header>",
        _caution(report),
        section("Figures", "results", _figures(report, names, known)),
        section("Charts", "charts", "".join(_chart(report, name, known) for name in names)),
        _notes(pairs),
        section("How they were computed", "computed", "".join(_computed(report, name, known) for name in names)),
        section("What was evaluated", "provenance", _provenance(report)),
    ]
    footer = f"Made by mars {escape(report.versions.get('mars', ''))}; the same figures, in full: the JSON report."
    return html.document(title, parts, footer)


def _facts(report: Report) -> str:
    return html.facts(
        {
            "Evaluated": report.sets["fake"].source,
            "Real": report.sets["real"].source,
            "Notes": f"{report.sets['fake'].notes:,} evaluated, {report.sets['real'].notes:,} real",
            "Fingerprint": report.fingerprint[:DIGITS],
            "Seed": report.seed,
            "Evaluated at": report.created.replace("T", " "),
            "Time": html.duration(report.seconds),
            "Device": report.device,
            "Threads": report.threads,
        }
    )


def _caution(report: Report) -> str:
    of = f"profile {report.profile} and fingerprint {report.fingerprint[:DIGITS]}"
    return (
        f'<p class="caution">These figures are of {escape(of)}: those of another profile or fingerprint must not be '
        f"put beside them. {PROFILES.get(report.profile, '')}</p>"
    )


def _figures(report: Report, names: Sequence[str], known: Headings) -> str:
    """Return the HTML of all values, a row for each set, and why some are missing."""
    head = ["", *(f"{escape(known[name].label)} {arrow(known[name])}".rstrip() for name in names)]
    table = html.table(
        head,
        [[escape(row), *(_cell(metrics.get(name)) for name in names)] for row, metrics in rows(report).items()],
        "figures",
    )
    key = "<p>↓ lower is better, ↑ higher is better; in brackets: 95 % bootstrap intervals over notes.</p>"
    missing = "".join(
        f"<li>{escape(', '.join(metrics))}: {escape(reason)}</li>"
        for reason, metrics in absent(rows(report), known).items()
    )
    return (table + key if names else "") + (f"<h3>Not measured</h3><ul>{missing}</ul>" if missing else "")


def _cell(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return "-"
    return number(figure.value) + (f"<small>{interval}</small>" if (interval := _interval(figure)) else "")


def _interval(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"[{number(figure.low)}, {number(figure.high)}]"


def _chart(report: Report, name: str, known: Headings) -> str:
    bars = [
        Bar(row, m.value, m.low, m.high, colour=1 if row == EVALUATED else 0)
        for row, metrics in rows(report).items()
        if (m := metrics.get(name)) is not None and m.value is not None
    ]
    metric = report.metrics.get(name)
    notes = f"{metric.n_fake:,} notes against {metric.n_real:,}" if metric and metric.value is not None else ""
    embedder = metric.embedder if metric else ""
    below = "; ".join(filter(None, [BETTER[known[name].better], notes, embedder]))
    return bar_chart(known[name].label, below, bars)


def _notes(pairs: Sequence[Pair]) -> str:
    """Return the HTML of pictures and sounds, of as many pairs as fit."""
    budget, shown = EMBEDDED, []
    for pair in pairs:
        media = {what: _media(waveform) for what, waveform in pair.sounds.items()}
        budget -= sum(len(data) for both in media.values() for data in both)
        if budget < 0:
            break
        figures = "".join(
            html.note(
                html.data_uri("image/png", picture),
                html.data_uri("audio/flac", sound),
                f"Spectrogram, {what}: {pair.title}; {FRONT_END.samples / FRONT_END.sample_rate:.3g} s across, "
                f"up to {FRONT_END.sample_rate / 2:g} Hz, low below",
                f"Listen, {what}: {pair.title}",
                what,
            )
            for what, (picture, sound) in media.items()
        )
        shown.append(f'<div class="note"><h3>{escape(pair.title)}</h3><div class="pair">{figures}</div></div>')
    left = len(pairs) - len(shown)
    hint = f"<p>Left out, so that this file stays small: {left:,} of {len(pairs):,}.</p>" if left else ""
    return section("Notes", "notes", "".join(shown) + hint)


def _media(waveform: Tensor) -> tuple[bytes, bytes]:
    """Return the picture (PNG) and sound (FLAC) of a waveform (samples,)."""
    samples = audio.pcm(waveform)
    height, width = SIZE
    spectrogram = audio.spectrogram(waveform.detach().cpu(), FRONT_END)
    picture = spectrogram_picture(spectrogram, frequency="log", height=height, width=width)
    return png(picture), html.flac(samples, FRONT_END.sample_rate)


def _computed(report: Report, name: str, headings: Headings) -> str:
    """Return the HTML of all details of a metric, for every set that has it; folded away."""
    computed = {row: m for row, metrics in rows(report).items() if (m := metrics.get(name)) and m.value is not None}
    known = {
        row: html.flat({key: value for key, value in asdict(metric).items() if value not in (None, "", {})})
        for row, metric in computed.items()
    }
    keys = dict.fromkeys(key for values in known.values() for key in values)
    table = html.table(
        ["", *map(escape, known)],
        [[escape(key), *(_text(values[key]) if key in values else "-" for values in known.values())] for key in keys],
    )
    return f"<details><summary>{escape(headings[name].label)}</summary>{table}</details>"


def _provenance(report: Report) -> str:
    """Return the HTML that says which sets and networks were used, and how the evaluated notes were made."""
    sets = html.table(
        ["", "source", "notes", "resampled", "padded", "cut", "clipped", "refused", "fingerprint"],
        [
            [
                escape(name),
                escape(s.source),
                *(f"{count:,}" for count in (s.notes, s.resampled, s.padded, s.cut, s.clipped, len(s.refused))),
                f"<code>{escape(s.fingerprint[:DIGITS])}</code>",
            ]
            for name, s in report.sets.items()
        ],
    )
    networks = html.table(
        ["network", *dict.fromkeys(key for embedder in report.embedders.values() for key in embedder)],
        [[escape(name), *map(_text, embedder.values())] for name, embedder in report.embedders.items()],
    )
    produced = html.table([], [[escape(name), _text(value)] for name, value in html.flat(report.produced).items()])
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return "".join(
        [
            f"<h3>Sets</h3>{sets}",
            *(_refused(name, sounds) for name, sounds in report.sets.items() if sounds.refused),
            f"<h3>Networks</h3>{networks}" if report.embedders else "",
            f"<h3>How the evaluated notes were made</h3>{produced}" if report.produced else "",
            f"<h3>Versions</h3><p>{escape(versions)}</p>",
        ]
    )


def _refused(name: str, sounds: Sounds) -> str:
    """Return the HTML of the files of a set that were left out; folded away."""
    files = "".join(f"<li>{escape(file)}: {escape(reason)}</li>" for file, reason in sounds.refused[:LISTED])
    more = f"<p>And {len(sounds.refused) - LISTED:,} more.</p>" if len(sounds.refused) > LISTED else ""
    return f"<details><summary>Files left out of {escape(name)}</summary><ul>{files}</ul>{more}</details>"


def _text(value: Any) -> str:
    text = ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else _plain(value)
    return escape(text if len(text) <= LONG else f"{text[:LONG]}…")


def _plain(value: Any) -> str:
    return number(value) if isinstance(value, float) else html.text(value)
