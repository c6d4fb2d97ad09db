"""Let the packaged model learn sounds of your own, and hear what it makes of them.

    pip install -e '.[data]'
    python examples/fine_tune.py my-sounds --time 10m

Without a folder it takes the guitars among the built-in notes. Sub-folders are instruments.
"""

import argparse
import subprocess
from pathlib import Path

import soundfile

import mars
from mars.data import builtin

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", nargs="?", type=Path, help="Your sounds.")
parser.add_argument("--time", default="10m", help="For all of it.")
parser.add_argument("--out", type=Path, default=Path("runs/fine-tuned"))
arguments = parser.parse_args()

folder = arguments.folder
if folder is None:
    folder = arguments.out.parent / "guitars"
    folder.mkdir(parents=True, exist_ok=True)
    dataset = builtin.load()
    chosen = [i for i, name in enumerate(dataset.names) if name.startswith("guitar")]
    for i, sound in zip(chosen, dataset.waveforms(chosen), strict=True):
        soundfile.write(folder / f"{dataset.names[i]}.wav", sound.numpy(), dataset.sample_rate)

# The same command in a terminal; interrupted, it goes on with the same --out.
command = ["mars-train", "finetune", str(folder), "--time", arguments.time, "--out", str(arguments.out)]
print("$", *command)
subprocess.run(command, check=True)

model = mars.load(arguments.out)
print(model)
for note in model.generate(4, seed=0):
    note.save(arguments.out / f"example-{note.index}.wav")
    print(note)
