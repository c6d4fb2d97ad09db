#!/usr/bin/env bash
# Trains the packaged model anew: renders the notes, trains both stages, packs the weights into mars/assets/models.
# About an hour and a half on two CPU cores. Needs FluidSynth's library and FluidR3_GM.sf2 (Debian: libfluidsynth3
# fluid-soundfont-gm). Repeats only what is not there yet, so it can be run again after an interruption.
set -euo pipefail
cd "$(dirname "$0")/.."
SOUNDFONT=${SOUNDFONT:-/usr/share/sounds/sf2/FluidR3_GM.sf2}

[ -d datasets/fluid ] || mars-data soundfont "$SOUNDFONT" --notes 14000 --seed 0 --out datasets/fluid
mars-train tokenizer --data datasets/fluid --out runs/pretrained-tokenizer \
  --set train.steps=4200 --set train.log_every=50 --set train.validate_every=500 --set train.save_every=500
mars-train var --data datasets/fluid --tokenizer runs/pretrained-tokenizer --out runs/pretrained-var \
  --set train.steps=3400 --set train.batch_size=16 --set train.log_every=50 --set train.validate_every=400 \
  --set train.save_every=400 --max-steps 1600  # from there on the loss on held-out instruments rises
python scripts/package_model.py runs/pretrained-tokenizer runs/pretrained-var mars/assets/models/notes
mars-eval reconstruct --data datasets/fluid --classifiers tiny --out evaluations/pretrained
