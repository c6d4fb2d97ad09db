"""`report.html` of a run folder: curves, codebook, pictures and sounds, in one file without network or script.

It is made from nothing but the run folder, so that it can be made again at any time. Sounds and pictures are part of
the file, the newest first, up to `EMBEDDED` bytes; what does not fit is linked, relative to the report.
"""

from __future__ import annotations

import io
import math
import time
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal

from mars import config
from mars.errors import ConfigError
from mars.files import read_bytes, read_json
from mars.pages import html
from mars.pages.charts import Curve, heat_map, line_chart
from mars.pages.html import duration, number, section
from mars.runs import samples
from mars.runs.log import Log, read_log
from mars.runs.record import Record, read_record

FILE = "report.html"
EMBEDDED = 2 << 20  # bytes of sounds and pictures, before base64 makes them a third longer
OLDER = 24  # earlier steps whose samples are shown

TRAINING, HELD_OUT, SECOND = ("training", 1), ("held out", 2), ("discriminator", 3)  # label, colour

# Title, unit, the curves by their names in the log, whether the axis may be logarithmic.
CHARTS: tuple[tuple[str, str, dict[str, tuple[str, int]], bool], ...] = (
    ("Loss", "loss", {"loss": TRAINING, "val_loss": HELD_OUT}, True),
    ("Reconstruction", "mean squared error", {"reconstruction": TRAINING, "val_mse": HELD_OUT}, True),
    ("Accuracy", "share of tokens", {"val_accuracy": HELD_OUT}, False),
    ("Absolute error", "mean absolute error", {"val_mae": HELD_OUT}, True),
    ("Quantiser", "VQ loss", {"vq": TRAINING}, True),
    ("Adversarial", "hinge loss", {"adversarial": ("tokenizer", 1), "discriminator": SECOND}, False),
    ("Adaptive weight", "factor", {"adaptive": TRAINING}, True),
    ("Gradient norm", "before clipping", {"grad_norm": TRAINING}, True),
    ("Learning rate", "learning rate", {"lr": TRAINING}, False),
    ("Speed", "notes per second", {"notes_per_s": TRAINING}, False),
    ("Memory", "peak, MB", {"memory_mb": TRAINING}, False),
)
CHARTED = {name for *_, names, _ in CHARTS for name in names} | {"step", "time", "epoch", "skipped"}


@dataclass
class Media:
    """Sources for the pictures and sounds of a run: embedded while there is room, then linked."""

    run: Path
    budget: int  # bytes
    linked: int = 0
    _sources: dict[Path, str] = field(default_factory=dict)

    def source(self, path: Path) -> str:
        """Return the value of a `src` attribute: a data URI (PNG or FLAC), or the path relative to the run."""
        if path not in self._sources:
            kind, data = (
                ("image/png", read_bytes(path, ConfigError)) if path.suffix == ".png" else ("audio/flac", _flac(path))
            )
            if len(data) <= self.budget:
                self.budget -= len(data)
                self._sources[path] = html.data_uri(kind, data)
            else:
                self.linked += 1
                self.budget = 0  # from here on everything older is linked
                self._sources[path] = path.relative_to(self.run).as_posix()
        return self._sources[path]


@dataclass(frozen=True)
class Shown:
    """The samples of one step, or the originals."""

    path: Path
    step: int
    names: list[str]
    seconds: float  # of a sound
    nyquist: float  # Hz


@dataclass(frozen=True, kw_only=True, slots=True)
class _Listing:
    """`samples.json` of a step."""

    names: tuple[str, ...]
    sample_rate: int  # Hz
    samples: int  # of a sound

    def __post_init__(self) -> None:
        if self.sample_rate < 1 or self.samples < 1:
            raise ConfigError(f"want a rate and samples above 0, got {self.sample_rate} and {self.samples}")


def write(run: Path) -> Path:
    """Make the report of the run folder `run`; returns its path.

    Raises:
        ConfigError: it is not a run folder, or its settings cannot be read.
        OSError: a file cannot be read or the report not be written.
    """
    path = run / FILE
    html.write(path, render(run))
    return path


def render(run: Path) -> str:
    """Return the report as HTML; see `write`."""
    record = read_record(run)
    settings = config.load(run / "config.json")
    log = read_log(run)
    stage = record.stage
    steps = settings.train.var.steps if stage == "var" else settings.train.tokenizer.steps
    name, state = run.resolve().name, log.state()
    labels = [f"{h}x{w}" for h, w in settings.tokenizer.scales]
    parts = [
        f'<header><h1>{escape(name)} <span class="state {state}">{state}</span></h1>',
        _facts(record, log, steps),
        "</header>",
        *(f'<p class="alarm">{escape(text)}</p>' for text in alarms(log, labels)),
        section("Curves", "charts", _charts(log)),
        section("Scales, coarse to fine", "charts", _scales(log, labels, settings.tokenizer.codebook_size)),
        _sounds(run, log, stage),
        _settings(settings, record),
    ]
    footer = (
        f"Made {time.strftime('%Y-%m-%d %H:%M')} from the run folder, up to step {log.step:,}; "
        "<code>mars-train report</code> makes it again."
    )
    return html.document(f"{name}, {state}", parts, footer)


def alarms(log: Log, labels: list[str]) -> list[str]:
    """List what has gone wrong, a line each."""
    messages = [f"Training diverged: {event.get('reason', '')}" for event in log.events("diverged")][-1:]
    since: dict[int, int] = {}
    for record in log.records:
        if isinstance(scales := record.get("collapsed"), list):
            step: int = record["step"]
            since = {k: since.get(k, step) for k in range(len(labels)) if k in scales}
    messages += [f"Scale {labels[k]} has collapsed: few of its codes in use since step {since[k]:,}." for k in since]
    if skipped := log.last("skipped"):
        messages.append(f"Steps that were not finite and changed nothing: {skipped}.")
    for event in list(log.events("failed"))[-3:]:
        messages.append(f"No {event.get('what')} of step {event['step']:,}: {event.get('reason')}")
    if log.unreadable:
        messages.append(f"Lines of the log that cannot be read and were left out: {log.unreadable}.")
    return messages


def _facts(record: Record, log: Log, steps: int) -> str:
    """Return the HTML that says what the run is and how far it has come."""
    started: dict[str, Any] = next(reversed([*log.events("started")]), {})
    best = log.best()
    rate, memory, epoch = (log.value(name) for name in ("notes_per_s", "memory_mb", "epoch"))
    facts = {
        "Stage": record.stage,
        "Preset": record.preset,
        "Steps": f"{log.step:,} of {steps:,}",
        "Epochs": None if epoch is None else number(epoch),
        "Time": duration(log.seconds),
        "Best on held-out notes": best and f"{best[0]} {number(best[2])} at step {best[1]:,}",
        "Speed": rate and f"{number(rate)} notes/s",
        "Memory, peak": memory and f"{memory / 1000:.2f} GB",
        "Device": started.get("device"),
        "Notes": f"{record.notes:,}, {record.train_notes:,} of them for training",
        "Data": record.data[:12],
        "Seed": record.seed,
        "Tokenizer": record.tokenizer,
        "Versions": started and f"mars {started.get('mars')}, PyTorch {started.get('torch')}",
        "Begun": time.strftime("%Y-%m-%d %H:%M", time.localtime(record.created)),
    }
    return html.facts(facts)


def _charts(log: Log) -> str:
    """Return the HTML of all curves, those without a place of their own at the end."""
    unit = "nats per token" if log.series("val_loss") else "loss"
    others = sorted({name for r in log.records if "event" not in r for name in r} - CHARTED)
    known = [*CHARTS, *((name, "value", {name: TRAINING}, True) for name in others)]
    return "".join(
        line_chart(title, unit if title == "Loss" else of, [_named(log, n, *key) for n, key in names.items()], log=far)
        for title, of, names, far in known
    )


def _named(log: Log, name: str, label: str, colour: int) -> Curve:
    best: Literal["lowest", "highest"] | None = None
    if name.startswith("val_"):
        best = "highest" if name == "val_accuracy" else "lowest"
    return Curve(label, log.series(name), colour, best)


def _scales(log: Log, labels: list[str], codes: int) -> str:
    """Return the HTML of the metrics per scale, over the steps."""
    maps = (
        ("Perplexity of the codes", "held-out notes", "perplexity", 1.0, codes),
        ("Codes used", "held-out notes", "codes_used", 1.0, codes),
        ("Perplexity in training", "since the line before", "train_perplexity", 1.0, codes),
        ("Codes used in training", "since the line before", "train_codes_used", 1.0, codes),
        ("Loss", "nats per token, held-out notes", "val_loss_per_scale", 0.0, math.log(codes)),
        ("Accuracy", "share of tokens, held-out notes", "val_accuracy_per_scale", 0.0, 1.0),
    )
    return "".join(heat_map(title, unit, labels, log.lists(name), low, high) for title, unit, name, low, high in maps)


def _sounds(run: Path, log: Log, stage: str) -> str:
    """Return the HTML of the newest samples beside the originals; earlier ones are folded away."""
    steps = sorted({event["step"] for event in log.events("samples")})
    shown_steps = [shown for step in steps if (shown := _shown(samples.folder(run, step), step))]
    if not shown_steps:
        return ""
    originals = _shown(run / samples.FOLDER / samples.ORIGINALS, 0)
    kind = "generated" if stage == "var" else "reconstruction"
    media, newest = Media(run, EMBEDDED), shown_steps[-1]
    notes = []
    for i, name in enumerate(newest.names):
        title, figures = name, _note(media, newest, i, kind, name)
        if originals is not None and i < len(originals.names):
            title = originals.names[i]
            figures = _note(media, originals, i, "original", title) + _note(media, newest, i, kind, title)
        notes.append(f'<div class="note"><h3>{escape(title)}</h3><div class="pair">{figures}</div></div>')
    earlier = shown_steps[-2::-1]
    earlier = earlier[:: -(-len(earlier) // OLDER)] if earlier else []
    folded = [
        f"<details><summary>Step {shown.step:,}</summary>"
        f'<div class="row">{"".join(_note(media, shown, i, kind) for i in range(len(shown.names)))}</div></details>'
        for shown in earlier
    ]
    hint = "<p>Some sounds and pictures are linked: keep this file in its run folder.</p>" if media.linked else ""
    return section(f"Notes at step {newest.step:,}", "notes", "".join(notes)) + section(
        "Earlier steps", "earlier", hint + "".join(folded) if folded else hint
    )


def _shown(path: Path, step: int) -> Shown | None:
    """Read the samples in a directory; None: they have been removed."""
    try:
        listing = path / "samples.json"
        document = config.from_document(_Listing, read_json(listing, ConfigError), listing, ConfigError)
    except ConfigError:
        return None
    names, rate, count = list(document.names), document.sample_rate, document.samples
    files = [path / f"{i}.{kind}" for i in range(len(names)) for kind in ("png", "wav")]
    return Shown(path, step, names, count / rate, rate / 2) if all(file.is_file() for file in files) else None


def _note(media: Media, shown: Shown, index: int, what: str, title: str = "") -> str:
    """Return the picture and player of a note; its name is not repeated below if it is the title above."""
    name = shown.names[index]
    caption = what if name == title else name if not title else f"{what}: {name}"
    return html.note(
        media.source(shown.path / f"{index}.png"),
        media.source(shown.path / f"{index}.wav"),
        f"Spectrogram, {what}: {name}; {shown.seconds:.3g} s across, up to {shown.nyquist:g} Hz, low below",
        f"Listen, {what}: {name}",
        caption,
    )


def _flac(path: Path) -> bytes:
    """Encode a WAV file as FLAC."""
    import soundfile

    try:
        return html.flac(*soundfile.read(io.BytesIO(read_bytes(path, ConfigError)), dtype="int16"))
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read as a sound ({error}); remove its folder") from None


def _settings(settings: config.Config, record: Record) -> str:
    """Return the HTML of the stage's settings that differ from the preset; all of them are folded away."""
    other = "train.tokenizer." if record.stage == "var" else "train.var."
    known = settings.preset in config.preset_names()
    plain = html.flat(config.to_dict(config.preset(settings.preset))) if known else {}
    values = html.flat(config.to_dict(settings))
    own = {name: html.text(value) for name, value in values.items() if not name.startswith(other)}
    changed = [
        (f"<code>{name}</code>", escape(value), escape(html.text(plain.get(name))))
        for name, value in own.items()
        if known and values[name] != plain.get(name)
    ]
    table = html.table(["setting", "this run", "preset"], changed) if changed else ""
    note = "" if changed else f"<p>Those of the preset {escape(settings.preset)}.</p>" if known else ""
    everything = html.table([], [(f"<code>{name}</code>", escape(value)) for name, value in own.items()])
    return section(
        "Settings", "settings", f"{table}{note}<details><summary>All settings</summary>{everything}</details>"
    )
