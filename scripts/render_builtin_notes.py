"""Renders mars/assets/notes, the notes that come with mars, from FluidR3 GM (Debian: fluid-soundfont-gm).

    python scripts/render_builtin_notes.py /usr/share/sounds/sf2/FluidR3_GM.sf2 \
        --licence /usr/share/doc/fluid-soundfont-gm/copyright

The package should stay small: of each family it takes the instruments whose sound FLAC packs best, and a peak
of 1/8 of full scale, which saves a quarter of the bytes and leaves the rounding below the -52 dB where the
spectrograms end. Reading brings the peak back.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile

from mars.data.soundfont import PEAK, SAMPLE_RATE, Job, choose, read_presets, render
from mars.labels import FAMILIES, SOURCES

OUT = Path(__file__).parents[1] / "mars" / "assets" / "notes"
LEVEL = 1 / 8  # peak in the files
INSTRUMENTS = 5  # per family
NOTES = 4  # per instrument; but more of those that pack well, fewer of those that do not
NOTES_OF = {"mallet": 8, "bass": 6, "guitar": 6, "organ": 3, "reed": 3}
PITCHES = (36, 84)


def encode(audio: np.ndarray) -> bytes:
    """FLAC, 16 bits, packed as tightly as it goes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, audio * (LEVEL / PEAK), SAMPLE_RATE, format="FLAC", subtype="PCM_16", compression_level=1.0)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("soundfont", type=Path)
    parser.add_argument("--licence", type=Path, required=True, help="Debian's copyright file of the soundfont")
    options = parser.parse_args()

    # Bank 0 only: the variations in other banks are too like it to be in another split.
    presets = [preset for preset in read_presets(options.soundfont) if preset.bank == 0]
    everything = choose(presets, None, 0, PITCHES)
    jobs = []
    for family, name in enumerate(FAMILIES):
        programs = {job.preset.program for job in everything if job.labels.family == family}
        members = [preset for preset in presets if preset.program in programs]
        jobs += choose(members, NOTES_OF.get(name, NOTES) * len(members), 0, PITCHES)
    files: dict[str, list[tuple[Job, bytes]]] = defaultdict(list)
    for job, audio in zip(jobs, render(options.soundfont, jobs, 2), strict=True):
        if np.abs(audio).max() > PEAK / 2:  # not silent
            files[job.labels.instrument].append((job, encode(audio)))

    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "audio").mkdir(parents=True)
    notes = {}
    for family, family_name in enumerate(FAMILIES):
        mine = [name for name in files if name.startswith(f"{family_name}_")]
        mine.sort(key=lambda name: np.mean([len(content) for _, content in files[name]]))
        # The grand piano is what people listen for.
        mine.sort(key=lambda name: name != "keyboard_acoustic_000")
        # No instrument is in two splits: one of each family goes to valid or, of every other family, to test.
        held_out = {min(2, len(mine) - 1): "test" if family % 2 else "valid"}
        for i, instrument in enumerate(mine[:INSTRUMENTS]):
            for job, content in files[instrument]:
                (OUT / "audio" / f"{job.name}.flac").write_bytes(content)
                labels = job.labels
                notes[job.name] = {
                    "instrument_str": labels.instrument,
                    "instrument_family": labels.family,
                    "instrument_family_str": family_name,
                    "instrument_source": labels.source,
                    "instrument_source_str": SOURCES[labels.source],
                    "pitch": labels.pitch,
                    "velocity": labels.velocity,
                    "preset": job.preset.name,
                    "split": held_out.get(i, "train"),
                }
    origin = {"kind": "built-in", "file": options.soundfont.name, "licence": "MIT", "author": "Frank Wen"}
    listing = {"sample_rate": SAMPLE_RATE, "peak": PEAK, "origin": origin, "notes": notes}
    (OUT / "examples.json").write_text(json.dumps(listing, indent=1) + "\n")
    copyright_ = options.licence.read_text("utf-8")
    holders = re.search(r"Copyright: \n\n(.*?)\n\s*\n", copyright_, re.S)
    licence = re.search(r" Permission is hereby granted.*?DEALINGS IN THE SOFTWARE\.", copyright_, re.S)
    if not holders or not licence:
        raise SystemExit(f"{options.licence} has no MIT text; give fluid-soundfont-gm's copyright file")
    (OUT / "LICENSE").write_text(
        "The notes in this folder were rendered from the soundfont FluidR3 GM.\n\n"
        f"{holders[1]}\n\nMIT License\n\n{licence[0]}\n"
    )


if __name__ == "__main__":
    main()
