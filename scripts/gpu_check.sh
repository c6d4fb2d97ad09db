#!/usr/bin/env bash
# All that only a GPU can tell, within eight minutes of a bare machine that has PyTorch and Triton for CUDA: the tests of
# CUDA, times of every operation on the host and on the device, the plan beside the memory, twenty compiled steps of each
# stage, and generation. Leaves gpu.json, gpu.md (tables for docs/gpu.md) and tests.txt in the folder given.
#
#   bash scripts/gpu_check.sh [FOLDER]
#   WHEELS=folder   install what is missing from its wheels, without a network
#   DEVICE=cpu      a rehearsal, on small sizes
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu} python=${PYTHON:-python3} device=${DEVICE:-cuda} failed=0
mkdir -p "$out"
if [[ -n ${WHEELS:-} ]]; then
  "$python" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" "$WHEELS"/*.whl
fi
"$python" -c 'import mars.kernels' || {
  echo "gpu_check: mars is not installed; put its wheel and those of what it lacks into WHEELS" >&2
  exit 2
}
selected=(-m gpu)
[[ $device == cuda ]] || selected=(-k "cpu")
timeout 180 "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py "${selected[@]}" 2>&1 | tee "$out/tests.txt" || failed=1
timeout 300 "$python" -m scripts.gpu_measure --device "$device" --out "$out" || failed=1
exit $failed
