#!/usr/bin/env bash
# The reference evaluation: the packaged model on rendered notes of instruments that it has not heard, with the packaged
# classifiers. Needs FluidSynth's library and FluidR3_GM.sf2 (Debian: libfluidsynth3 fluid-soundfont-gm); no network, no
# GPU. About 20 minutes for rendering and 10 for the rest on two CPU cores; goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
SOUNDFONT=${SOUNDFONT:-/usr/share/sounds/sf2/FluidR3_GM.sf2}
DATA=${DATA:-datasets/fluid}

[ -d "$DATA" ] || mars-data soundfont "$SOUNDFONT" --notes 14000 --seed 0 --out "$DATA"
mars-eval reconstruct --data "$DATA" --classifiers tiny --out evaluations/reference-reconstruction
mars-eval generate -n 1814 --data "$DATA" --train "$DATA" --classifiers tiny --out evaluations/reference-generation
