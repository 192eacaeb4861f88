#!/bin/sh
# On a GPU machine: take the wheels of build/gpu-pack (`make gpu-pack`), if they came along, then run gpu_measure.py with
# the options given here:   sh scripts/gpu_here.sh --out results.jsonl [--rows decode,scan]
# PYTHON=... names the Python. Without the pack the rows run too; the command line and the tests need it.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -d build/gpu-pack ]; then
    "$python" -m pip install -q --no-index --no-input --disable-pip-version-check --break-system-packages \
        --find-links build/gpu-pack --requirement scripts/gpu_pack.txt ||
        echo "gpu_here: the pack could not be installed; the rows need none of it" >&2
fi
PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" exec "$python" benchmarks/gpu_measure.py "$@"
