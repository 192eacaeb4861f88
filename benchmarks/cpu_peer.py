"""Ours beside llama.cpp on the same weights: models made once and kept, both sides, floors. Used by cpu_*.py.

The models are random: `hybrid` (290M) and `dense` (283M), the presets hybrid-290m and dense-283m, saved as our folders
and as GGUF by our own exporter. llama.cpp runs as a process of its own (`llama_process.py`) in a Python that has
llama-cpp-python 0.3.36: `pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36`, 10 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from side_by_side import machine as here
from side_by_side import record_row, summary

from whimbrel import LanguageModel
from whimbrel.engine.bench import BITS
from whimbrel.model.gguf import GGUF
from whimbrel.model.gguf_write import write
from whimbrel.model.linear import pack_model
from whimbrel.model.presets import preset
from whimbrel.ops import machine

SHAPES = {"hybrid": "hybrid-290m", "dense": "dense-283m"}
THEIRS = {"float32": "f32", "float16": "f16", "int8": "q8_0", "int4": "q4_0"}
SLOW = (
    "its {} kernels and its attention wait for arithmetic here, not for memory (measured: inference notes, section 3.6)"
)


class LlamaCpp:
    """The other process."""

    def __init__(self, python: str, threads: int) -> None:
        command = [python, str(Path(__file__).with_name("llama_process.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.threads = threads
        self.version = self.ask("version")

    def ask(self, do: str, **order: Any) -> Any:
        """Send an order and wait for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"llama.cpp ended while it should {do} {order}")
        return json.loads(line)

    def load(self, file: Path, **settings: Any) -> None:
        """Load a model with these settings: flash, context, sequences, ubatch."""
        self.ask("load", file=str(file), threads=self.threads, **settings)

    def fastest(
        self, choices: list[dict[str, Any]], trial: Callable[[dict[str, Any]], float]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Load each choice (file and settings) in turn, keep the one whose trial is quickest; seconds of all."""
        seconds = []
        for choice in choices:
            self.load(**choice)
            seconds.append(trial(choice))
        best = choices[seconds.index(min(seconds))]
        self.load(**best)
        said = [f"{c['file'].stem} flash {'on' if c['flash'] else 'off'} ubatch {c['ubatch']}" for c in choices]
        return best, dict(zip(said, seconds, strict=True))


class Models:
    """The folders and files of the two shapes, made when they are first asked for."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def folder(self, shape: str) -> Path:
        """Random float32 weights as our folder."""
        folder = self.cache / shape
        if not folder.exists():
            LanguageModel(preset(SHAPES[shape])).initialise(0).save(folder)
        return folder

    def gguf(self, shape: str, kind: str) -> Path:
        """The same weights for llama.cpp."""
        file = self.cache / f"{shape}-{kind}.gguf"
        return file if file.exists() else write(self.folder(shape), file, kind)

    def ours(self, shape: str, dtype: str) -> LanguageModel:
        """The same weights in our engine."""
        folder = self.folder(shape)
        if dtype == "float16":
            return LanguageModel.load(folder, dtype=dtype)
        if dtype in BITS:
            whole, folder = folder, self.cache / f"{shape}-{dtype}"
            if not folder.exists():
                model = LanguageModel.load(whole)
                pack_model(model, BITS[dtype])
                model.save(folder)
        return LanguageModel.load(folder)


def their_bytes(file: Path, context: int, batch: int, states: int) -> int:
    """Bytes that llama.cpp must move for a step: weights without the embedding's other rows, float16 keys and values.

    `states`: bytes of the recurrent states of `batch` sequences, read and written.
    """
    gguf = GGUF(file)
    sizes = {name: int(tensor.n_bytes) for name, tensor in gguf._tensors.items()}
    config = gguf.config
    table = sizes.pop("token_embd.weight")
    rows = table if config.tie_embeddings else batch * table // config.vocab_size
    kv = 2 * 2 * config.num_key_value_heads * config.head_dim * config.count("*") * (context + 1) * batch
    return sum(sizes.values()) + rows + kv + 2 * states


def limits() -> tuple[float, float]:
    """Bytes and operations a second, measured anew: others may be using the machine."""
    machine._bandwidth.cache_clear()
    machine._matmul_peak.cache_clear()
    return machine.bandwidth(), machine.matmul_peak()


def turns(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each way says it took: one uncounted round, then `repeats` rounds of all in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            took = way()
            if turn:
                seconds[name].append(took)
    return seconds


def clocked(work: Callable[[], object], times: int = 1) -> float:
    """Seconds of doing it so many times."""
    begin = time.perf_counter()
    for _ in range(times):
        work()
    return time.perf_counter() - begin


def compare(
    tokens: int, seconds: Mapping[str, list[float]], floors: Mapping[str, float], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """A row: both sides' rates, floors and shares, and their ratio. `tokens` are those of one repeat."""
    times = {side: summary(runs) for side, runs in seconds.items()}
    names = list(times)
    shares = {side: floors[side] / times[side]["median"] for side in names}
    row = {
        "tokens_per_second": {side: tokens / times[side]["median"] for side in names},
        "spread": {side: tokens / t["most"] for side, t in times.items()}
        | {f"{side} best": tokens / t["least"] for side, t in times.items()},
        "floor_seconds": dict(floors),
        "share_of_floor": shares,
        "ratio": times[names[1]]["median"] / times[names[0]]["median"],
        **extra,
    }
    if shares[names[1]] < 0.5 and "llama.cpp" in names:
        row["why_below_half"] = SLOW.format(extra["peer"]["file"])
    return row


def main(name: str, about: str, rows: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]]) -> None:
    """Measure the rows that were asked for, print each and keep it."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that has llama-cpp-python", required=True)
    parser.add_argument(
        "--rows", nargs="+", choices=list(rows), default=list(rows), metavar="ROW", help=", ".join(rows)
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "whimbrel" / "benchmarks")
    parser.add_argument("--prepare", action="store_true", help="only make the models")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.models = Models(options.cache)
    if options.prepare:
        for shape in SHAPES:
            for dtype, kind in THEIRS.items():
                options.models.gguf(shape, kind)
                options.models.ours(shape, dtype)
        return
    options.peer = LlamaCpp(options.peer_python, options.threads)
    print(json.dumps(here()))
    for row in options.rows:
        result = rows[row](options)
        if "why_below_half" in result:
            print(f"{row}: {result['why_below_half']}")
        for side, rate in result["tokens_per_second"].items():
            share, floor = result["share_of_floor"][side], result["floor_seconds"][side]
            print(f"{row:<20} {side:<10} {rate:>8.1f} tokens/s, {100 * share:.0f} % of its floor of {floor:.3f} s")
        print(f"{row:<20} ratio {result['ratio']:.2f}", flush=True)
        record_row(name, row, result)
