"""First sounds: new notes of the packaged model as WAV files, one of them varied, two of them morphed.

    pip install -e .
    python examples/first_sound.py --out sounds

It takes some seconds on a laptop, without a GPU or network.
"""

import argparse
from pathlib import Path

import mars

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("sounds"), help="Folder for the notes.")
parser.add_argument("-n", type=int, default=8, help="How many organ notes.")
arguments = parser.parse_args()
arguments.out.mkdir(parents=True, exist_ok=True)

model = mars.load()  # or the folder of a run, or of a model
print(model)

notes = model.generate(arguments.n, family="organ", pitch=(48, 72), seed=0)  # what is not said is drawn for each note
for note in notes:
    note.save(arguments.out / f"organ-{note.index}.wav")
    print(note)

# A sound is tokens, coarse to fine: seven grids of codes, the last of 8 x 8.
tokens = model.encode(notes[0].waveform[None])
print(f"note 0 as tokens: {tuple(tokens.shape)}, and back: {tuple(model.decode(tokens).shape)} samples")

for variation in model.vary(notes[0], 3, seed=1):  # its coarse tokens stay, the fine ones are drawn anew
    variation.save(arguments.out / f"variation-{variation.index}.wav")

bass = model.generate(1, family="bass", pitch=48, seed=2)[0]
for step in model.morph(notes[0], bass, (0.25, 0.5, 0.75)):
    step.save(arguments.out / f"morph-{step.index}.wav")

print(f"{len(list(arguments.out.glob('*.wav')))} sounds in {arguments.out}")
