"""A model of Nemotron-Nano-9B-v2's shape in int4 on a CPU: its folder mapped, tokens decoded, the memory that took.

The folder is made on the fly, a shard at a time: random codes under scales that give weights of 0.02 (5.8 GB; the
embedding, of which a token reads one row, is float16), removed again unless --folder names a place. Measured in a
process of its own: tokens/s after a context, bytes of a step, their share of what a sum over memory reads here, and the
most memory that was resident, of which the mapped file is a part.
Run: python benchmarks/cpu_9b_int4.py            (needs 8 GB of memory and 6 GB of disk)
     python benchmarks/cpu_9b_int4.py --layers 6 --vocabulary 16384        (the first layers only)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from load_9b import resident
from side_by_side import record
from torch import Tensor

from whimbrel import LanguageModel, ModelConfig
from whimbrel.engine import bench
from whimbrel.model import families, fewbits, tensors
from whimbrel.model.presets import preset
from whimbrel.ops import machine

SHARD = 1_000_000_000
CONTEXTS = (512, 4096, 16384)
TURNS = 5


def random_tensors(model: LanguageModel, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Name on disk and values of every tensor of a model on the meta device."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (1 << 22,), dtype=torch.uint8, generator=g)
    numbers = 0.02 * torch.randn(1 << 22, generator=g)
    for place, (ours, tensor) in enumerate(model.state_dict().items()):
        shape = families.disk_shape(names[ours], tensor.shape)
        if ours.endswith(".scales"):
            yield names[ours], torch.full(shape, 0.02 / 4.61, dtype=tensor.dtype)  # 4.61: of uniform codes -8 … 7
            continue
        tile = codes if tensor.dtype == torch.uint8 else numbers.to(tensor.dtype)
        if ours.endswith(("norm.weight", "norm_f.weight", "norm_weight")):
            tile = tile + 1
        yield names[ours], tile.roll(place).repeat(-(-tensor.numel() // len(tile)))[: tensor.numel()].reshape(shape)


def make(config: ModelConfig, folder: Path) -> None:
    """Write the folder shard by shard; the process never holds more than one."""
    folder.mkdir(parents=True)
    model, names = LanguageModel(config, device="meta"), families.names(config)
    fewbits.prepare(model, fewbits.FewBits(4, 32, (names["embeddings.weight"].removesuffix(".weight"),)), names, "")
    said = {**families.config_to_hf(config), **fewbits.to_config(model, names)}
    (folder / "config.json").write_text(json.dumps(said))
    shard: dict[str, Tensor] = {}
    table: dict[str, str] = {}

    def close() -> None:
        tensors.write(shard, folder, 2 * SHARD)
        file = (folder / "model.safetensors").rename(folder / f"model-{len(list(folder.iterdir())):05d}.safetensors")
        table.update(dict.fromkeys(shard, file.name))
        shard.clear()

    for name, tensor in random_tensors(model, fewbits.on_disk(model, names)):
        shard[name] = tensor
        if sum(held.nbytes for held in shard.values()) > SHARD:
            close()
    close()
    (folder / tensors.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))


def measure(folder: Path, contexts: list[int]) -> dict[str, Any]:
    """Load and decode in this process: bandwidth and rows in turns, the medians of all turns."""
    before, begin = resident("VmRSS"), time.perf_counter()
    model = LanguageModel.load(folder)
    loaded, peak = time.perf_counter() - begin, machine.matmul_peak()
    tasks = [bench.Task(model, context, 1) for context in contexts]
    bandwidths, turns = [], []
    for _ in range(TURNS):
        machine._bandwidth.cache_clear()
        bandwidths.append(machine.bandwidth())
        turns.append([bench.measure(task, "decode", bandwidths[-1], peak) for task in tasks])
    bandwidth, rows = statistics.median(bandwidths), []
    for each in zip(*turns, strict=True):
        row = sorted(each, key=lambda found: found["seconds"])[TURNS // 2]
        share = row["bytes_per_token"] / row["seconds"] / bandwidth
        rows.append({**row, "bandwidth_share": share, "all_seconds": [found["seconds"] for found in each]})
    return {
        "bandwidth": bandwidth,
        "all_bandwidths": bandwidths,
        "peak": peak,
        "native": bench.isa(),
        "files_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "load_seconds": loaded,
        "peak_resident_bytes": resident("VmHWM"),
        "resident_before_bytes": before,
        "resident_anonymous_bytes": resident("RssAnon"),
        "rows": rows,
    }


def main() -> None:
    """Make the folder if it is not there, decode in another process, keep what that gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="only the first layers of the 9B")
    parser.add_argument("--vocabulary", type=int, help="a smaller vocabulary than the 9B's 131,072")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--folder", type=Path, help="where the folder is, or is made, and stays")
    parser.add_argument("--make", action="store_true", help="make the folder and stop")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.contexts)))
        return
    whole = preset("nemotron-nano-9b-v2")
    vocabulary = options.vocabulary or whole.vocab_size
    config = replace(whole, pattern=whole.pattern[: options.layers], vocab_size=vocabulary)
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place) / "model"
        if not folder.exists():
            make(config, folder)
        if options.make:
            return
        command = [sys.executable, __file__, "--measure", str(folder), "--contexts", *map(str, options.contexts)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    if options.layers or options.vocabulary:
        print(json.dumps(found, indent=2))
        return
    record("cpu_9b_int4", {"shape": "nemotron-nano-9b-v2, random int4 weights in groups of 32", **found})


if __name__ == "__main__":
    main()
