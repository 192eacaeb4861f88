#!/bin/sh
# Collect what a bare GPU machine lacks into build/gpu-pack (ignored by git): wheels for Python 3.12 on Linux x86-64.
# That machine has torch with CUDA, Triton, transformers, safetensors, tokenizers and numpy; the tracked files come along.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
pack=build/gpu-pack most=$((60 * 1024)) # KiB: 64 MiB may travel
rm -rf "$pack.new" && mkdir -p "$pack.new"
"$python" -m pip download -q --disable-pip-version-check --no-input --dest "$pack.new" --only-binary :all: \
    --implementation cp --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
    --requirement scripts/gpu_pack.txt
size=$(du -sk "$pack.new" | cut -f1)
if [ "$size" -gt "$most" ]; then
    echo "gpu-pack: the wheels are $size KiB, more than the $most that may travel; take some out of scripts/gpu_pack.txt" >&2
    exit 1
fi
rm -rf "$pack" && mv "$pack.new" "$pack"
echo "gpu-pack: $(ls "$pack" | wc -l) wheels, $size KiB, in $pack; on the GPU machine: sh scripts/gpu_here.sh --out FILE"
