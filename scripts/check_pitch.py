#!/usr/bin/env python3
"""Of the notes in a folder, how many sound at the pitch their name asks for, within 50 cents?

The folder is one that mars-generate wrote (<index>-<family>-<pitch>.wav) or NSynth's
(<family>_<source>_<number>-<pitch>-<velocity>.wav). Where notes.json lists the notes, its pitches are used.
The pitch heard is the median over the voiced frames of the sustained part, by pYIN (Mauch and Dixon 2014)
from librosa, which this needs. Exits with 1 where fewer than --at-least of the notes are in tune.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path

import librosa
import numpy as np
import soundfile

LOWEST, HIGHEST = 27.5, 4200.0  # Hz; A0 and just above C8: all of a piano
SUSTAIN = 0.1, 2.5  # seconds, after the attack and before NSynth's release at 3 s
FRAME = 2048  # samples at 16 kHz; pYIN wants two periods and more of the lowest pitch in a frame


def asked_pitches(folder: Path) -> dict[str, int]:
    """MIDI pitch by file name, of every .wav whose name, or entry in notes.json, tells."""
    pitches: dict[str, int] = {}
    for path in sorted(folder.glob("*.wav")):
        match = re.fullmatch(r"(?:\d+-\w+-(\d+)|\w+_\d+-(\d+)-\d+)", path.stem)
        if match:
            pitches[path.name] = int(match[1] or match[2])
    listing = folder / "notes.json"
    if listing.is_file():
        notes = json.loads(listing.read_text())
        notes = notes.get("notes", []) if isinstance(notes, dict) else notes
        for note in notes:
            name = Path(note["file"]).name if "file" in note else None
            if name and "pitch" in note and (folder / name).is_file():
                pitches[name] = int(note["pitch"])
    return pitches


def heard_pitch(path: Path) -> tuple[float, float]:
    """(MIDI pitch or NaN, fraction of sustained frames that are voiced)."""
    audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    sustained = audio[int(SUSTAIN[0] * rate) : int(SUSTAIN[1] * rate)].mean(axis=1)
    frame = FRAME * max(1, round(rate / 16_000))
    if len(sustained) < frame or not sustained.any():
        return math.nan, 0.0
    f0, voiced, _ = librosa.pyin(
        sustained,
        fmin=LOWEST,
        fmax=min(HIGHEST, rate / 2 - 1),
        sr=rate,
        frame_length=frame,
        hop_length=frame // 2,
    )
    if not voiced.any():
        return math.nan, 0.0
    return float(librosa.hz_to_midi(np.median(f0[voiced]))), float(voiced.mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--at-least", type=float, default=0.75, metavar="FRACTION", help="0.75 unless given")
    parser.add_argument("--cents", type=float, default=50.0, help="tolerance, 50 unless given")
    options = parser.parse_args()
    pitches = asked_pitches(options.folder)
    if not pitches:
        print(f"{options.folder}: no .wav named <index>-<family>-<pitch>.wav", file=sys.stderr)
        return 2

    in_tune = octaves_off = 0
    print(f"{'note':<44} {'asked':>5} {'heard':>7} {'cents':>7} {'voiced':>6}")
    for name, asked in pitches.items():
        heard, voiced = heard_pitch(options.folder / name)
        cents = 100 * (heard - asked)
        good = abs(cents) <= options.cents  # false for NaN: an unvoiced note is not at its pitch
        octave = not good and abs(math.remainder(cents, 1200)) <= options.cents
        in_tune += good
        octaves_off += octave
        numbers = f"{heard:7.2f} {cents:+7.0f}" if voiced else f"{'none':>7} {'':>7}"
        remark = "" if good else "octave" if octave else "off"
        print(f"{name:<44} {asked:>5} {numbers} {voiced:>6.0%}  {remark}".rstrip())
    fraction = in_tune / len(pitches)
    print(f"{in_tune} of {len(pitches)} notes ({fraction:.0%}) within {options.cents:g} cents of their pitch")
    if octaves_off:
        print(f"{octaves_off} of the others would be, were they moved by whole octaves")
    return 0 if fraction >= options.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
