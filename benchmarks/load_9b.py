"""Load a checkpoint of Nemotron-Nano-9B-v2's shape; see what memory that took, beside what `plan` says of its weights.

The folder is made on the fly: random bfloat16 weights (17.8 GB) in shards, removed again unless --folder names a place.
Run: python benchmarks/load_9b.py            (needs 20 GB of memory and 18 GB of disk)
     python benchmarks/load_9b.py --layers 4 --vocabulary 16384     (the first layers only: 1.5 GB)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from side_by_side import record

from whimbrel.model import LanguageModel, ModelConfig, checkpoint, count, families
from whimbrel.model.presets import preset
from whimbrel.ops.machine import bandwidth


def make(config: ModelConfig, folder: Path, shard_bytes: int = 1_000_000_000) -> None:
    """Write random weights shard by shard, so that making the folder needs no more memory than a shard."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(families.config_to_hf(config)))
    tile = torch.randn(1 << 22).bfloat16()
    names = families.names(config)
    table: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    parameters = list(LanguageModel(config, device="meta", dtype=torch.bfloat16).named_parameters())
    for place, (ours, parameter) in enumerate(parameters):
        shape = families.disk_shape(names[ours], parameter.shape)
        row = tile.roll(place).repeat(-(-parameter.numel() // len(tile)))[: parameter.numel()]
        shard[names[ours]] = row.to(parameter.dtype).reshape(shape)
        if sum(tensor.nbytes for tensor in shard.values()) >= shard_bytes or place == len(parameters) - 1:
            file = f"model-{len(list(folder.iterdir())):05d}.safetensors"
            save_file(shard, folder / file)
            table |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def resident(key: str) -> int:
    """Bytes of this process in memory: now (`VmRSS`), or the most so far (`VmHWM`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(folder: Path) -> dict[str, Any]:
    """Load in this process and say what it took, over what the process took before."""
    before = resident("VmRSS")
    begin = time.perf_counter()
    model = checkpoint.load(folder, dtype="bfloat16")
    seconds = time.perf_counter() - begin
    sizes = [parameter.nbytes for parameter in model.parameters()]
    return {
        "weights_bytes": count.weights_bytes(model.config, "bfloat16"),
        "loaded_bytes": sum(sizes),
        "largest_tensor_bytes": max(sizes),
        "peak_bytes": resident("VmHWM") - before,
        "files": len(list(folder.glob("*.safetensors"))),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Make the folder, load it in a process of its own, print what that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="only the first layers of the 9B")
    parser.add_argument("--vocabulary", type=int, help="a smaller vocabulary than the 9B's 131,072")
    parser.add_argument("--folder", type=Path, help="where to make the folder, and to keep it")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    whole = preset("nemotron-nano-9b-v2")
    pattern = whole.pattern[: arguments.layers]
    config = replace(whole, pattern=pattern, vocab_size=arguments.vocabulary or whole.vocab_size)
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.folder or Path(place) / "model"
        if not folder.exists():
            make(config, folder)
        command = [sys.executable, __file__, "--measure", str(folder)]
        figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if arguments.layers or arguments.vocabulary:
        print(json.dumps(figures))
        return
    floor = 2 * figures["weights_bytes"] / bandwidth("cpu")  # every byte is read from the file and written to memory
    record(
        "load_9b", figures | {"floor_seconds": round(floor, 1), "share_of_floor": round(floor / figures["seconds"], 2)}
    )


if __name__ == "__main__":
    main()
