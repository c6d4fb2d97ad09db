"""Generated notes: one of them, and a folder of them with a listing, which can be filled in several sessions.

    0000-brass-060.wav ...   16-bit WAV files
    notes.json               with what and how they were made, and of each note its `file`, `condition` and `sha256`
    index.html               a page to hear and see them, where that is wanted, and with it
    pictures/                a picture of each, and
    spectrograms.png         one picture of the first of them

The listing is written first, without the sums of the files, and names them all: so the folder cannot be taken for a
whole set before it is one, the same call goes on where it was interrupted, and any other is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mars import audio, lock
from mars.config import AudioConfig
from mars.errors import ConfigError, DataError
from mars.files import read_json, write_atomically
from mars.labels import CLOSED, Condition, described, note_name
from mars.pages import html, listen
from mars.pages.picture import Picture, contact_sheet, png, spectrogram_picture, write_png
from mars.runtime import free_space
from mars.terminal import log

LISTING = "notes.json"
PICTURE, PICTURES, PAGE = "spectrograms.png", "pictures", "index.html"
PICTURED = 64  # notes at most
SILENT = 1e-3  # peak, -60 dBFS
_HEADER = 44  # bytes of a WAV file before its samples
_FREE = ("model", "batch_size")  # settings that no note depends on
_ADDED = {"start": 0, "temperature": 1.0}  # settings that older listings lack, and what they then are


@dataclass(frozen=True, eq=False, repr=False)
class Note:
    """One generated note, on the CPU. In a notebook it shows its spectrogram, with a player below."""

    index: int
    waveform: Tensor  # (samples,) float32, at most full scale
    log_magnitude: Tensor  # (bins, frames) in [-1, 1], as decoded, before its phase was made up
    ids: Tensor  # int64 (L,)
    condition: Condition
    sample_rate: int  # Hz

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.waveform) / self.sample_rate

    @property
    def label(self) -> str:
        """What it was asked to be, in words: "acoustic brass, pitch 60, velocity 100"; "any" if nothing was."""
        return described(self.condition) or "any"

    def spectrogram(self) -> Tensor:
        """Log magnitude (bins, frames) in [-1, 1], low bins first, as the model made it, before its phase was found.

        That of the waveform itself, which differs a little, is `mars.audio.spectrogram`.
        """
        return self.log_magnitude

    def save(self, path: Path | str) -> None:
        """Write it as mono 16-bit WAV; the file appears whole or not at all. Raises `OSError`."""
        audio.write_wav(path, self.waveform, self.sample_rate)

    def __repr__(self) -> str:
        return f"<Note {self.index}: {self.label}, {self.seconds:.3g} s at {self.sample_rate} Hz>"

    def _repr_html_(self) -> str:
        picture = spectrogram_picture(self.log_magnitude, frequency="log", height=256, width=384)
        sound = html.flac(audio.pcm(self.waveform), self.sample_rate)
        return html.note(
            html.data_uri("image/png", png(picture)),
            html.data_uri("audio/flac", sound),
            spoken=f"spectrogram of note {self.index}, {self.label}",
            label=f"note {self.index}",
            caption=f"{self.index}: {self.label}",
        )


@dataclass(frozen=True)
class Filled:
    """The listing and the counts of a complete folder of notes."""

    silent: int  # notes
    full_scale: int  # notes that reach it, as those made quieter do


class NoteFolder:
    """A folder of notes that this process fills; see `fill`."""

    def __init__(
        self,
        path: Path,
        origin: Mapping[str, Any],
        files: Sequence[str],
        conditions: Sequence[Mapping[str, Any]],
        config: AudioConfig,
        *,
        first: int = 0,
        page: str = "",
        originals: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Describe a folder of notes `first`, `first` + 1, …; nothing is written yet.

        Args:
            origin: what and how they are made, for the listing.
            page: title of a page to listen to them, which is then made, with pictures.
            originals: sounds that they were made of, (samples,) by their titles, for the page.
        """
        notes = [
            {"index": i, "file": file, "condition": {**dict.fromkeys(CLOSED), **condition}}
            for i, (file, condition) in enumerate(zip(files, conditions, strict=True), first)
        ]
        self.path, self.files, self.config, self.first = path, files, config, first
        self.page, self.originals = page, originals or {}
        self.document: dict[str, Any] = json.loads(json.dumps({**origin, "notes": notes}))  # as it is read
        self.bytes = _HEADER + 2 * config.samples  # of each file
        self.missing: list[int] = []  # notes that are not there

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield the missing notes as runs without a gap: (first, one past the last), from 0."""
        for _, pairs in groupby(enumerate(self.missing), lambda pair: pair[1] - pair[0]):
            stretch = [index for _, index in pairs]
            yield stretch[0], stretch[-1] + 1

    def add(self, index: int, waveform: Tensor) -> None:
        """Write one of the missing notes."""
        audio.write_wav(self.path / self.files[index - self.first], waveform, self.config.sample_rate)

    def finish(self) -> Filled:
        """Put the sums of the files in the listing, and make the page."""
        silent = full_scale = 0
        shown: list[Tensor] = []
        stale = self.missing or not all((self.path / name).exists() for name in (PICTURE, PICTURES, PAGE))
        for note in self.document["notes"]:
            content = (self.path / note["file"]).read_bytes()
            note["sha256"] = hashlib.sha256(content).hexdigest()
            samples = np.frombuffer(content, "<i2", offset=_HEADER)
            low, high = int(samples.min()), int(samples.max())
            silent += max(-low, high) < SILENT * 32768
            full_scale += high == 32767 or low == -32768
            if self.page and stale:
                spectrogram = audio.spectrogram(torch.from_numpy(samples / np.float32(32768)), self.config)
                (self.path / PICTURES).mkdir(exist_ok=True)
                write_png(self.path / _picture(note["file"]), picture_of(spectrogram))
                shown += [spectrogram] * (len(shown) < PICTURED)
        if self.page and stale:
            labels = [Path(file).stem for file in self.files[: len(shown)]]
            sheet = contact_sheet(torch.stack(shown), labels, height=256, width=128, extent=extent(self.config))
            write_png(self.path / PICTURE, sheet)
            html.write(self.path / PAGE, self._rendered())
        self._write_listing()
        return Filled(silent, full_scale)

    def _rendered(self) -> str:
        """Return the page to listen to them, as HTML."""
        seconds, khz = extent(self.config)
        made = self.document
        known = {"Model": made.get("model"), "Seed": made.get("seed"), "Guidance": made.get("cfg")}
        sounds = [
            listen.Sound(
                note["file"],
                _picture(note["file"]),
                f"{note['index']}: {described(note['condition']) or 'any'}",
                note["condition"]["family"],
                pitch,
                " · ".join(filter(None, (None if pitch is None else note_name(pitch), note["file"]))),
            )
            for note in made["notes"]
            for pitch in [note["condition"]["pitch"]]
        ]
        originals = [
            listen.Sound(
                html.data_uri("audio/flac", html.flac(audio.pcm(waveform), self.config.sample_rate)),
                html.data_uri("image/png", png(picture_of(audio.spectrogram(waveform, self.config)))),
                title,
            )
            for title, waveform in self.originals.items()
        ]
        return listen.render(
            self.page,
            {name: value for name, value in known.items() if value is not None},
            sounds,
            seconds=seconds,
            khz=khz,
            bins=self.config.bins,
            footer=f"Made by mars {made.get('mars', '')}; how, in full: {LISTING}.",
            originals=originals,
        )

    def begin(self) -> None:
        """Clean up after a killed process, find the missing notes and write the listing. The folder must be locked."""
        listed = self.check()
        for file in self.path.glob(".*.tmp"):
            if file.name[1:].rsplit(".", 2)[0] in {LISTING, PICTURE, PAGE, *self.files}:
                file.unlink()  # a process was killed while it wrote
        sums = [None] * len(self.files) if listed is None else [note.get("sha256") for note in listed["notes"]]
        self.missing = [i for i, total in enumerate(sums) if not self._complete(self.path / self.files[i], total)]
        free_space(self.path, self.space(len(self.missing)))
        if listed is None:
            self._write_listing()

    def space(self, notes: int) -> int:
        """Return the bytes that so many notes take, with their listing and picture."""
        return notes * (self.bytes + (2**17 if self.page else 1024)) + (2**24 if self.page else 2**20)

    def check(self) -> dict[str, Any] | None:
        """Return the listing that is there. Raises an error if it is of another call, or other files are there."""
        listed = self._listed()
        known = (
            {LISTING, *self.files, *((PICTURE, PICTURES, PAGE) if self.page else ())} if listed is not None else set()
        )
        for file in sorted(self.path.iterdir()):
            if file.name not in known and not file.name.startswith("."):
                raise DataError(f"{self.path} holds {file.name}, which is none of these notes; name a new folder")
        return listed

    def _listed(self) -> dict[str, Any] | None:
        file = self.path / LISTING
        if not file.is_file():
            return None
        there = read_json(file, DataError)
        try:
            plain = [{k: v for k, v in note.items() if k != "sha256"} for note in there["notes"]]
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{file} is not one that mars wrote; name a new folder") from None
        for name, value in self.document.items():
            earlier = plain if name == "notes" else there.get(name, _ADDED.get(name))
            if earlier != value and name not in _FREE:
                differs = "other notes" if name == "notes" else f"{name} {earlier}, not {value}"
                raise ConfigError(f"{self.path} was begun with {differs}; name a new folder")
        return dict(there)

    def _complete(self, file: Path, total: str | None) -> bool:
        if not file.is_file() or file.stat().st_size != self.bytes:
            return False
        return total is None or hashlib.sha256(file.read_bytes()).hexdigest() == total

    def _write_listing(self) -> None:
        content = (json.dumps(self.document, indent=1) + "\n").encode()
        if not (self.path / LISTING).is_file() or (self.path / LISTING).read_bytes() != content:
            write_atomically(self.path / LISTING, content)


def _picture(file: str) -> str:
    """Return the path of the picture of a note's file, from the folder."""
    return f"{PICTURES}/{Path(file).stem}.png"


def picture_of(spectrogram: Tensor) -> Picture:
    """Return the picture of a spectrogram (bins, frames) for a page to listen."""
    height, width = listen.SIZE
    return spectrogram_picture(spectrogram, frequency=listen.FREQUENCY, height=height, width=width)


def extent(config: AudioConfig) -> tuple[float, float]:
    """Return the seconds across a spectrogram, and the kHz up it."""
    return config.frames * config.hop / config.sample_rate, config.bins * config.sample_rate / config.n_fft / 1000


@contextmanager
def fill(folder: NoteFolder, say: Callable[[str], None] = log) -> Iterator[NoteFolder]:
    """Lock a folder of notes, new or begun by the same call, while the block adds the missing ones; then finish it.

    Raises:
        ConfigError: it was begun with other settings, or another process has it.
        DataError: something else is in it.
        DiskError: there is no room for the files.
    """
    path = folder.path
    if path.exists() and not path.is_dir():
        raise DataError(f"{path} is not a folder; name a new one")
    if path.exists():
        folder.check()  # before anything is written there, the lock included
    else:
        free_space(path, folder.space(len(folder.files)))
        path.mkdir(parents=True, exist_ok=True)  # by another process this very moment: then one of both gets the lock
    with lock.claim(path, say):
        try:
            folder.begin()
            yield folder
        finally:
            with suppress(OSError):
                (path / lock.NAME).unlink()


def stem(index: int, n: int, condition: Mapping[str, Any]) -> str:
    """Return the name of a note's file, `0007-brass-060`; "any" for what is not known. n: all notes."""
    pitch = "any" if condition["pitch"] is None else f"{condition['pitch']:03d}"
    return f"{index:0{max(4, len(str(n - 1)))}d}-{condition['family'] or 'any'}-{pitch}"
