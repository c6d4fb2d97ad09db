"""An instrument from a model: the notes that fit, made into samples, an SFZ file and a page to listen.

    NAME.sfz            for a sampler
    samples/060-v100.wav, …
    index.html          a page to hear the samples, with pictures/
    instrument.json     how it was made, and what was measured of each note

Of several candidates for each note, drawn from the same random streams, that one is taken whose timbre is nearest to
the root note's and to the note beside it, among those that have the pitch asked for.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mars import audio
from mars.arguments import integer
from mars.data.sound import waveform
from mars.errors import ConfigError, DataError
from mars.files import write_atomically
from mars.instrument import sfz
from mars.instrument.pitch import measured
from mars.instrument.sample import cut
from mars.instrument.timbre import distance, timbre
from mars.labels import VELOCITIES, Condition, note_name
from mars.model import Model, Sound
from mars.notes import SILENT, Note, extent, picture_of
from mars.pages import html, listen
from mars.pages.picture import write_png

IN_TUNE = 0.5  # semitones off the pitch asked for, at most
LAYERS = 3  # velocities, unless others are asked for


@dataclass(frozen=True, eq=False)
class Candidate:
    """A note that may become part of the instrument."""

    note: Note
    pitch: float  # MIDI number with a fraction, as measured
    octaves: int  # that it sounds above the pitch asked for; 0 but for sounds such as an organ's sub-octave
    timbre: npt.NDArray[np.float64]

    @property
    def cents(self) -> float:
        """Out of tune by, but for the octave."""
        return 100 * (self.pitch - 12 * self.octaves - (self.note.condition["pitch"] or 0))


@dataclass(frozen=True)
class Made:
    """What is known of an instrument that has been written."""

    sfz: Path
    page: Path
    notes: int
    left_out: list[str]  # notes for which no candidate had the pitch asked for
    looped: int
    detuned: float  # cents: the most that a sample is retuned by
    octaves: int  # that all of it sounds above its keys
    neighbours: float  # dB: timbre distance of notes beside each other, mean


def keys_of(model: Model, condition: Condition, pitches: tuple[int, int] | None, every: int) -> list[int]:
    """Return the pitches to sample: over the range that training notes of this condition usually had, or as asked.

    Raises:
        ConfigError: the model has no pitch as a condition, or it is not known what it was trained on.
    """
    every = integer("every", every, 1)
    if not model.ranges.takes("pitch", 60):
        raise ConfigError(
            "an instrument needs a model that was trained with pitch as a condition, on notes of known pitch"
        )
    if pitches is None:
        alike = model.ranges.holding({**condition, "pitch": None, "velocity": None})
        known = [entry["pitch"] for entry in alike if entry["pitch"][0] >= 0]
        if not known:
            raise ConfigError("it is not known which pitches the model was trained on; give a range of `pitch`")
        pitches = min(low for low, _ in known), max(high for _, high in known)
    low, high = pitches
    return list(range(low + (high - low) % every // 2, high + 1, every))


def velocities_of(model: Model, condition: Condition) -> list[int | None]:
    """Return the velocities to sample unless others are asked for: at most `LAYERS` of those trained on."""
    if not model.ranges.takes("velocity", 100):
        return [None]
    alike = model.ranges.holding({**condition, "pitch": None, "velocity": None})
    levels = sorted({level for entry in alike for level in entry.get("velocity", VELOCITIES)}) or [*VELOCITIES]
    places = np.linspace(0, len(levels) - 1, min(LAYERS, len(levels))).round().astype(int)
    return [levels[place] for place in places.tolist()]


def make(
    model: Model,
    out: Path,
    name: str,
    condition: Condition,
    pitches: Sequence[int],
    velocities: Sequence[int | None],
    *,
    like: Sound | None = None,
    tries: int = 8,
    seed: int = 0,
    allow_untrained: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Made:
    """Write the new folder `out`, whole or not at all.

    Args:
        name: of the SFZ file.
        condition: labels of all notes but their pitch and velocity.
        pitches, velocities: rising; each pitch at each velocity is a note. A velocity of None is left open.
        like: a sound whose timbre the notes are to have; none: that of the candidate most like the others.
        tries: candidates for each note.
        seed, allow_untrained, settings: of `Model.iterate`.
        progress: called with the notes chosen and how many there are to be.

    Raises:
        ConfigError: a setting cannot be used, or `out` is there.
        DataError: no note has the pitch asked for; `like` cannot be read, or has no pitch.
    """
    tries = integer("tries", tries, 1)
    if out.exists():
        raise ConfigError(f"{out} is there; name a new folder")
    wanted = [(pitch, velocity) for velocity in velocities for pitch in pitches]
    conditions = {
        key: model.ranges.accepted({**condition, "pitch": key[0], "velocity": key[1]}, allow_untrained=allow_untrained)
        for key in wanted
    }

    def drawn(key: tuple[int, int | None]) -> list[Candidate]:
        same = {**settings, "seed": seed, "allow_untrained": allow_untrained}
        notes = model.iterate(tries, conditions=[conditions[key]] * tries, **same)
        return [found for note in notes if (found := judged(note)) is not None]

    # Outwards from the middle of the range at the highest velocity, then down through the velocities.
    centre = pitches[len(pitches) // 2]
    order = sorted(wanted, key=lambda key: (-(key[1] or 0), abs(key[0] - centre)))
    root = None if like is None else _timbre_of(model, like)
    chosen: dict[tuple[int, int | None], Candidate] = {}
    left_out, octaves = [], None
    for done, key in enumerate(order, 1):
        found = drawn(key)
        if octaves is None and found:
            heard = [candidate.octaves for candidate in found]
            octaves = 0 if 0 in heard else max(heard, key=heard.count)
        found = [candidate for candidate in found if candidate.octaves == octaves]
        if found:
            near = [root] if root is not None else [candidate.timbre for candidate in found]
            near += [beside.timbre] if (beside := _beside(key, chosen)) is not None else []
            chosen[key] = found[int(np.argmin([sum(distance(c.timbre, of) for of in near) for c in found]))]
            root = chosen[key].timbre if root is None else root
        else:
            left_out.append(note_name(key[0]) + (f" at velocity {key[1]}" if key[1] is not None else ""))
        if progress is not None:
            progress(done, len(order))
    if not chosen:
        raise DataError(
            f"none of {len(order) * tries} notes has the pitch asked for; train longer, or give more `tries`"
        )
    made = {
        **model.record,
        "model": str(model.hash),
        "name": name,
        "condition": {name: value for name, value in condition.items() if value is not None},
        "tries": tries,
        "seed": seed,
        **settings,
    }
    return _write(model, out, name, chosen, made, left_out, octaves or 0)


def judged(note: Note) -> Candidate | None:
    """Return a note as a candidate; None if it is silent, has no pitch, or another than that of its condition."""
    samples, asked = note.waveform.numpy(), note.condition["pitch"]
    if asked is None or float(np.abs(samples).max()) < SILENT:
        return None
    pitch = measured(samples, note.sample_rate)
    if pitch is None:
        return None
    octaves = round((pitch - asked) / 12)
    if abs(pitch - asked - 12 * octaves) > IN_TUNE:
        return None
    return Candidate(note, pitch, octaves, timbre(samples, note.sample_rate, asked))


def neighbours(chosen: dict[tuple[int, int | None], Candidate]) -> float:
    """Return the mean timbre distance in dB of notes beside each other, of one velocity; 0 if there are none."""
    found = []
    for velocity in {velocity for _, velocity in chosen}:
        row = [chosen[key].timbre for key in sorted(k for k in chosen if k[1] == velocity)]
        found += [distance(a, b) for a, b in itertools.pairwise(row)]
    return float(np.mean(found)) if found else 0.0


def _timbre_of(model: Model, like: Sound) -> npt.NDArray[np.float64]:
    rate = model.config.audio.sample_rate
    samples = (like.waveform if isinstance(like, Note) else waveform("like", like, model.config.audio)[0]).numpy()
    pitch = measured(samples, rate)
    if pitch is None:
        raise DataError(
            f"{like if isinstance(like, str | Path) else 'like'} has no steady pitch; give a sound with one"
        )
    return timbre(samples, rate, pitch)


def _beside(key: tuple[int, int | None], chosen: dict[tuple[int, int | None], Candidate]) -> Candidate | None:
    """Return the chosen note nearest to a key: of its velocity if there is one, else of the next and the same pitch."""
    if not chosen:
        return None
    return chosen[min(chosen, key=lambda other: (abs((other[1] or 0) - (key[1] or 0)), abs(other[0] - key[0])))]


def _write(
    model: Model,
    out: Path,
    name: str,
    chosen: dict[tuple[int, int | None], Candidate],
    made: dict[str, Any],
    left_out: list[str],
    octaves: int,
) -> Made:
    config = model.config.audio
    samples = {key: cut(candidate.note.waveform.numpy(), config.sample_rate) for key, candidate in chosen.items()}
    quietest = min(sample.level for sample in samples.values())
    zones = sfz.layers(sorted({velocity or 0 for _, velocity in chosen}))
    regions, listed, sounds = [], [], []
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "samples").mkdir(parents=True)
    (temporary / "pictures").mkdir()
    try:
        for key in sorted(chosen, key=lambda k: (k[1] or 0, k[0])):
            pitch, velocity = key
            of_layer = sorted(p for p, v in chosen if v == velocity)
            every = max((b - a for a, b in itertools.pairwise(of_layer)), default=1)
            stem = f"{pitch:03d}" + (f"-v{velocity:03d}" if velocity is not None else "")
            sample, candidate = samples[key], chosen[key]
            region = sfz.Region(
                file=f"samples/{stem}.wav",
                keys=sfz.spread(of_layer, every // 2)[pitch],
                velocities=zones[velocity or 0],
                key=pitch,
                tune=-round(candidate.cents),
                volume=quietest - sample.level,
                loop=sample.loop,
            )
            waveform = torch.from_numpy(sample.samples)
            audio.write_wav(temporary / region.file, waveform, config.sample_rate)
            write_png(temporary / f"pictures/{stem}.png", picture_of(audio.spectrogram(waveform, config)))
            regions.append(region)
            listed.append({**asdict(region), "candidate": candidate.note.index, "cents": round(candidate.cents, 1)})
            title = note_name(pitch) + (f", velocity {velocity}" if velocity is not None else "")
            detail = f"{region.file}; {'loops' if sample.loop else 'dies away'}; {candidate.cents:+.0f} cents, retuned"
            sounds.append(listen.Sound(region.file, f"pictures/{stem}.png", title, None, pitch, detail))
        about = ", ".join(str(value) for value in made["condition"].values())
        comments = [f"{name}: {about or 'made'} by mars {made['mars']}, seed {made['seed']}"]
        write_atomically(temporary / f"{name}.sfz", sfz.text(comments, regions).encode())
        seconds, khz = extent(config)
        page = listen.render(
            name,
            {"Labels": about, "Seed": made["seed"], "Candidates": f"{made['tries']} for each note"},
            sounds,
            seconds=seconds,
            khz=khz,
            bins=config.bins,
            footer=f"Made by mars {made['mars']}; how, in full: instrument.json.",
        )
        html.write(temporary / "index.html", page)
        content = json.dumps({**made, "left_out": left_out, "regions": listed}, indent=1) + "\n"
        write_atomically(temporary / "instrument.json", content.encode())
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Made(
        out / f"{name}.sfz",
        out / "index.html",
        len(chosen),
        left_out,
        sum(sample.loop is not None for sample in samples.values()),
        max(abs(candidate.cents) for candidate in chosen.values()),
        octaves,
        neighbours(chosen),
    )
