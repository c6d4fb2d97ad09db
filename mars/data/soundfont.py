"""Notes rendered from a soundfont (SF2 or SF3), shaped like NSynth's: held for 3 s, released for 1 s, 16 kHz.

Every note comes from a fresh synth, so no tail of one can leak into the next. That is affordable because
libfluidsynth shares the samples of a file between the synths of a process: each worker keeps one idle synth
that holds them, and a fresh one parses only the tables (30 ms for the 148 MB of FluidR3 instead of 600 ms).
"""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mars.data.notes import SILENT, Audio, fit
from mars.data.packed import ALLOW_BAD, Dataset, Writer
from mars.data.splits import HoldOut
from mars.errors import DataError, LostProcess, needed
from mars.files import sha256
from mars.labels import FAMILIES, SOURCES, VELOCITIES, Labels

SAMPLE_RATE = 16_000  # Hz
HELD, RELEASED = 3, 1  # s
PACKAGES = ("soxr", "pyfluidsynth")
PITCHES = (21, 108)  # MIDI; a piano's keys
# Level: every note to one peak, as in NSynth, where velocity is timbre and not loudness; 0.9 leaves room for
# what a model adds to it.
PEAK = 0.9
_OVERSAMPLING = 3  # soundfonts alias least near the rate of their samples, so render at 48 kHz and decimate
_DRUMS = 128  # the bank of drum kits

# General MIDI programs (numbered from 0): first, last, family, source, lowest and highest MIDI note that the
# instrument plays. What is missing has no clear pitch: orchestra hit (55), woodblock, drums and reversed
# cymbal (115-119), sound effects (120-127).
_PROGRAMS = (
    (0, 1, "keyboard", "acoustic", 21, 108),  # grand and bright piano
    (2, 2, "keyboard", "electronic", 21, 108),  # electric grand
    (3, 3, "keyboard", "acoustic", 21, 108),  # honky-tonk
    (4, 5, "keyboard", "electronic", 28, 103),  # electric pianos
    (6, 6, "keyboard", "acoustic", 29, 89),  # harpsichord
    (7, 7, "keyboard", "electronic", 36, 96),  # clavinet
    (8, 8, "mallet", "acoustic", 60, 108),  # celesta
    (9, 9, "mallet", "acoustic", 72, 108),  # glockenspiel
    (10, 10, "mallet", "acoustic", 60, 96),  # music box
    (11, 11, "mallet", "acoustic", 53, 89),  # vibraphone
    (12, 12, "mallet", "acoustic", 45, 96),  # marimba
    (13, 13, "mallet", "acoustic", 65, 108),  # xylophone
    (14, 14, "mallet", "acoustic", 60, 84),  # tubular bells
    (15, 15, "mallet", "acoustic", 55, 86),  # dulcimer
    (16, 18, "organ", "electronic", 36, 96),  # drawbar, percussive, rock
    (19, 19, "organ", "acoustic", 24, 108),  # church organ
    (20, 20, "organ", "acoustic", 36, 96),  # reed organ
    (21, 21, "organ", "acoustic", 41, 93),  # accordion
    (22, 22, "organ", "acoustic", 60, 96),  # harmonica
    (23, 23, "organ", "acoustic", 41, 93),  # bandoneon
    (24, 25, "guitar", "acoustic", 40, 84),  # nylon and steel strings
    (26, 31, "guitar", "electronic", 40, 86),  # jazz, clean, muted, overdriven, distorted, harmonics
    (32, 32, "bass", "acoustic", 28, 60),
    (33, 37, "bass", "electronic", 28, 67),  # fingered, picked, fretless, slapped
    (38, 39, "bass", "synthetic", 24, 72),
    (40, 40, "string", "acoustic", 55, 100),  # violin
    (41, 41, "string", "acoustic", 48, 88),  # viola
    (42, 42, "string", "acoustic", 36, 76),  # cello
    (43, 43, "string", "acoustic", 28, 60),  # double bass
    (44, 45, "string", "acoustic", 28, 96),  # tremolo and plucked sections
    (46, 46, "string", "acoustic", 24, 103),  # harp
    (47, 47, "mallet", "acoustic", 36, 60),  # timpani
    (48, 49, "string", "acoustic", 28, 96),  # sections
    (50, 51, "string", "synthetic", 36, 96),
    (52, 53, "vocal", "acoustic", 43, 84),  # choir
    (54, 54, "vocal", "synthetic", 43, 84),
    (56, 56, "brass", "acoustic", 54, 86),  # trumpet
    (57, 57, "brass", "acoustic", 34, 75),  # trombone
    (58, 58, "brass", "acoustic", 26, 65),  # tuba
    (59, 59, "brass", "acoustic", 54, 86),  # muted trumpet
    (60, 60, "brass", "acoustic", 34, 77),  # horn
    (61, 61, "brass", "acoustic", 36, 90),  # section
    (62, 63, "brass", "synthetic", 36, 96),
    (64, 64, "reed", "acoustic", 56, 88),  # soprano saxophone
    (65, 65, "reed", "acoustic", 49, 81),  # alto
    (66, 66, "reed", "acoustic", 44, 76),  # tenor
    (67, 67, "reed", "acoustic", 36, 69),  # baritone
    (68, 68, "reed", "acoustic", 58, 91),  # oboe
    (69, 69, "reed", "acoustic", 52, 84),  # English horn
    (70, 70, "reed", "acoustic", 34, 75),  # bassoon
    (71, 71, "reed", "acoustic", 50, 91),  # clarinet
    (72, 72, "flute", "acoustic", 74, 108),  # piccolo
    (73, 73, "flute", "acoustic", 59, 98),  # flute
    (74, 79, "flute", "acoustic", 55, 96),  # recorder, pan flute, bottle, shakuhachi, whistle, ocarina
    (80, 87, "synth_lead", "synthetic", 21, 108),  # leads
    (88, 95, "synth_lead", "synthetic", 28, 96),  # pads
    (96, 103, "synth_lead", "synthetic", 36, 96),  # effects that still have a pitch
    (104, 107, "guitar", "acoustic", 43, 84),  # sitar, banjo, shamisen, koto
    (108, 108, "mallet", "acoustic", 48, 84),  # kalimba
    (109, 109, "reed", "acoustic", 43, 80),  # bagpipe
    (110, 110, "string", "acoustic", 55, 96),  # fiddle
    (111, 111, "reed", "acoustic", 48, 84),  # shanai
    (112, 113, "mallet", "acoustic", 60, 96),  # tinkle bell, agogo
    (114, 114, "mallet", "acoustic", 48, 84),  # steel drum
)


@dataclass(frozen=True, slots=True)
class Preset:
    """One sound of a soundfont."""

    name: str
    bank: int
    program: int
    keys: frozenset[int]  # MIDI notes for which it has samples


@dataclass(frozen=True, slots=True)
class Job:
    """One note to render."""

    preset: Preset
    labels: Labels

    @property
    def name(self) -> str:
        return f"{self.labels.instrument}-{self.labels.pitch:03d}-{self.labels.velocity:03d}"


def read_presets(file: str | Path) -> list[Preset]:
    """Return the presets of a soundfont by (bank, program), from its own tables (SoundFont 2.04, section 7).

    Raises `DataError` for a file that is no soundfont or whose tables do not fit together.
    """
    file = Path(file)
    try:
        tables = _tables(file)
        # Records: phdr is (name, program, bank, first zone, ...), inst (name, first zone); a zone is where
        # its generators start in pgen or igen; a generator is (operator, amount).
        headers = list(struct.iter_unpack("<20sHHHIII", tables["phdr"]))
        instruments = list(struct.iter_unpack("<20sH", tables["inst"]))
        starts = {kind: list(struct.iter_unpack("<HH", tables[f"{kind}bag"])) for kind in "pi"}
        generators = {kind: list(struct.iter_unpack("<HH", tables[f"{kind}gen"])) for kind in "pi"}

        def zones(kind: str, first: int, last: int) -> Iterator[tuple[set[int], int]]:
            """Yield keys of each zone and what it points at, for the zones first..last - 1."""
            points = {"p": 41, "i": 53}[kind]  # the operators `instrument` and `sampleID`
            default = range(128)
            for zone in range(first, last):
                fields = dict(generators[kind][starts[kind][zone][0] : starts[kind][zone + 1][0]])
                keys = default
                if 43 in fields:  # keyRange: low byte lowest, high byte highest
                    keys = range(fields[43] & 0xFF, min(fields[43] >> 8, 127) + 1)
                if points in fields:
                    yield set(keys), fields[points]
                elif zone == first:  # a first zone that points at nothing holds the defaults of the others
                    default = keys

        covered = [
            set().union(*(keys for keys, _ in zones("i", first[1], after[1])))
            for first, after in itertools.pairwise(instruments)
        ]
        presets = [
            Preset(
                header[0].split(b"\0")[0].decode("latin-1"), header[2], header[1],
                frozenset().union(*(keys & covered[at] for keys, at in zones("p", header[3], after[3]))),
            )
            for header, after in itertools.pairwise(headers)
        ]  # fmt: skip
    except (struct.error, IndexError, KeyError) as error:
        raise DataError(f"{file} is a damaged soundfont ({error}); fetch it again") from None
    if not presets:
        raise DataError(f"{file} has no presets; choose another soundfont")
    return sorted(presets, key=lambda preset: (preset.bank, preset.program))


def _tables(file: Path) -> dict[str, bytes]:
    """Return the chunks of the LIST `pdta`; the samples before them are skipped."""
    if not file.is_file():
        raise DataError(f"{file} is not a file; give the path of an .sf2 or .sf3 soundfont")
    with file.open("rb") as stream:
        head = stream.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"sfbk":
            raise DataError(f"{file} is not a soundfont (no RIFF sfbk header); give an .sf2 or .sf3 file")
        size = file.stat().st_size
        while len(header := stream.read(8)) == 8:
            length = struct.unpack("<I", header[4:])[0]
            if header[:4] == b"LIST" and stream.read(4) == b"pdta":
                if length > min(size, 1 << 28):
                    raise DataError(f"{file}: its tables claim {length:,} bytes; fetch the soundfont again")
                body, chunks, at = stream.read(length - 4), {}, 0
                while at + 8 <= len(body):
                    (part,) = struct.unpack_from("<I", body, at + 4)
                    chunks[body[at : at + 4].decode("latin-1")] = body[at + 8 : at + 8 + part]
                    at += 8 + part + part % 2
                return chunks
            stream.seek(length + length % 2 - (4 if header[:4] == b"LIST" else 0), 1)
    raise DataError(f"{file} has no preset tables (LIST pdta); fetch the soundfont again")


def choose(presets: list[Preset], notes: int | None, seed: int, pitches: tuple[int, int] = PITCHES) -> list[Job]:
    """Return the notes to render: all that there are, or `notes` of them spread evenly.

    Every instrument gets the same number, as far as it has them; its pitches are spread over its range and
    its velocities taken in turn. The same arguments give the same list. Raises `DataError` for an empty one.
    """
    programs = {
        program: (FAMILIES.index(family), SOURCES.index(source), range(low, high + 1))
        for first, last, family, source, low, high in _PROGRAMS
        for program in range(first, last + 1)
    }
    numbers = dict.fromkeys(itertools.product(range(len(FAMILIES)), range(len(SOURCES))), 0)
    rng = np.random.default_rng(seed)
    playable = []
    for preset in presets:
        if preset.bank == _DRUMS or preset.program not in programs:
            continue
        family, source, known = programs[preset.program]
        # Numbered as in NSynth, per family and source, and before anything is left out: names stay the same.
        name = f"{FAMILIES[family]}_{SOURCES[source]}_{numbers[family, source]:03d}"
        numbers[family, source] += 1
        keys = sorted(key for key in preset.keys if key in known and pitches[0] <= key <= pitches[1])
        if keys:
            playable.append((preset, Labels(name, family, source), keys))
    if not playable:
        raise DataError(f"no melodic preset plays between MIDI {pitches[0]} and {pitches[1]}; widen `pitches`")
    jobs = []
    quotas = _share(notes, [len(keys) * len(VELOCITIES) for *_, keys in playable], rng)
    for (preset, labels, keys), quota in zip(playable, quotas, strict=True):
        velocities = rng.permutation(VELOCITIES)
        rounds, rest = divmod(quota, len(keys))
        spread = ((np.arange(rest) + rng.random()) * len(keys) / max(rest, 1)).astype(int)
        for turn in range(rounds + 1):
            for i in range(len(keys)) if turn < rounds else spread:
                velocity = int(velocities[(i + turn) % len(VELOCITIES)])
                note = Labels(labels.instrument, labels.family, labels.source, keys[i], velocity)
                jobs.append(Job(preset, note))
    return sorted(jobs, key=lambda job: job.name)


def _share(total: int | None, limits: list[int], rng: np.random.Generator) -> list[int]:
    """Share `total` evenly within these limits; chance decides who gets the remainder."""
    if total is None or total >= sum(limits):
        return limits
    level = next(level for level in itertools.count() if sum(min(n, level + 1) for n in limits) > total)
    shares = [min(limit, level) for limit in limits]
    below_limit = [i for i, limit in enumerate(limits) if limit > level]
    for i in rng.permutation(below_limit)[: total - sum(shares)]:
        shares[i] += 1
    return shares


def library() -> Any:
    """Import `fluidsynth`. Raises `MissingPackage` or, for the library, `DataError`, that say what to install."""
    with needed("a soundfont", *PACKAGES):
        try:
            import fluidsynth
        except ModuleNotFoundError:
            raise
        except ImportError:  # pyfluidsynth is there, the library it binds is not
            raise DataError(
                "soundfonts need the FluidSynth library; install it (Debian: apt install libfluidsynth3)"
            ) from None
    return fluidsynth


class Renderer:
    """Renders notes of one soundfont. Raises `MissingPackage` or, for an unreadable file, `DataError`."""

    def __init__(self, file: str | Path) -> None:
        self._fluidsynth, self._file = library(), str(file)
        with needed("a soundfont", *PACKAGES):
            import soxr
        self._resample: Callable[..., Audio] = soxr.resample
        # pyfluidsynth's get_samples gives 16 bits with a dither; the library itself can write floats.
        self._write = self._fluidsynth._fl.fluid_synth_write_float
        self._holder = self._synth()[0]  # keeps the samples in the library's cache

    def close(self) -> None:
        """Free the samples."""
        self._holder.delete()

    def _synth(self) -> tuple[Any, int]:
        synth = self._fluidsynth.Synth(
            samplerate=float(SAMPLE_RATE * _OVERSAMPLING), channels=16,
            **{"synth.reverb.active": 0, "synth.chorus.active": 0, "synth.cpu-cores": 1},
        )  # fmt: skip
        font = synth.sfload(self._file)
        if font < 0:
            synth.delete()
            raise DataError(f"{self._file}: FluidSynth cannot read it; fetch the soundfont again")
        return synth, font

    def render(self, preset: Preset, pitch: int, velocity: int) -> Audio:
        """Render one note (64000,), mono, its peak at PEAK; zeros where the preset plays nothing."""
        synth, font = self._synth()
        try:
            synth.program_select(0, font, preset.bank, preset.program)
            rate = SAMPLE_RATE * _OVERSAMPLING
            stereo = np.zeros((2, (HELD + RELEASED) * rate), np.float32)
            left, right = (ctypes.c_void_p(channel.ctypes.data) for channel in stereo)

            def write(start: int, count: int) -> None:
                self._write(ctypes.c_void_p(synth.synth), count, left, start, 1, right, start, 1)

            synth.noteon(0, pitch, velocity)
            write(0, HELD * rate)
            synth.noteoff(0, pitch)
            write(HELD * rate, RELEASED * rate)
        finally:
            synth.delete()
        audio = self._resample(stereo.mean(0), rate, SAMPLE_RATE)
        peak = float(np.abs(audio).max())
        scale = PEAK / peak if peak > SILENT else 1.0
        return fit(audio * np.float32(scale), (HELD + RELEASED) * SAMPLE_RATE)


_renderer: Renderer | None = None  # of a worker process


def _start_worker(file: str) -> None:
    global _renderer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _renderer = Renderer(file)


def _work(job: Job) -> Audio:
    assert _renderer is not None
    return _renderer.render(job.preset, job.labels.pitch, job.labels.velocity)


def render(file: str | Path, jobs: list[Job], processes: int = 1) -> Iterator[Audio]:
    """Render the notes in the order of `jobs`, on at most one process for each processor."""
    processes = min(processes, os.cpu_count() or 1)
    if processes < 2:
        renderer = Renderer(file)
        try:
            yield from (renderer.render(job.preset, job.labels.pitch, job.labels.velocity) for job in jobs)
        finally:
            renderer.close()
        return
    Renderer(file).close()  # so that an error comes here and not from a worker
    spawn = multiprocessing.get_context("spawn")  # a fork would copy threads and locks of torch
    with ProcessPoolExecutor(processes, spawn, _start_worker, (str(file),)) as pool:
        ahead = 64 * processes  # not all at once: finished notes wait in memory
        try:
            for start in range(0, len(jobs), ahead):
                with _interrupts_held():  # the first call starts the processes
                    notes = pool.map(_work, jobs[start : start + ahead], chunksize=8)
                yield from notes
        except BrokenProcessPool:
            raise LostProcess(
                f"a process that renders {file} was ended, perhaps for want of memory; start again with fewer processes"
            ) from None


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back in the block, and for good in processes started in it: only the parent handles it."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pack_soundfont(
    file: str | Path,
    out: str | Path,
    *,
    notes: int | None = None,
    seed: int = 0,
    pitches: tuple[int, int] = PITCHES,
    processes: int = 1,
    hold_out: HoldOut | None = None,
    allow_bad: float = ALLOW_BAD,
    licence: str = "unknown",
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Render `notes` notes (None: all there are) of a soundfont into a packed dataset at `out`.

    `hold_out`: see `mars.data.splits.hold_out`.

    Raises `DataError` for the soundfont or missing libraries, `TooManyBadError`, `DiskError`, `LostProcess`.
    """
    library()
    jobs = choose(read_presets(file), notes, seed, pitches)
    presets = {job.labels.instrument: job.preset for job in jobs}
    origin = {
        "kind": "soundfont", "file": Path(file).name, "sha256": sha256(Path(file)), "licence": licence,
        "notes": notes, "seed": seed, "pitches": list(pitches),
        "presets": {name: [preset.bank, preset.program, preset.name] for name, preset in presets.items()},
    }  # fmt: skip
    samples = (HELD + RELEASED) * SAMPLE_RATE
    with Writer(
        out, sample_rate=SAMPLE_RATE, samples=samples, origin=origin, expected=len(jobs), progress=progress
    ) as writer:
        for job, audio in zip(jobs, render(file, jobs, processes), strict=True):
            writer.add(job.name, audio, job.labels)
        return writer.commit(allow_bad, hold_out)
