"""Decoding one sequence beside llama.cpp: hybrid and dense, float16, int8 against q8_0, int4 against q4_0.

A repeat is about a second of steps; five repeats of both sides in turn. Floor: bytes that the side must move over the
bandwidth measured before or after (the better). llama.cpp: flash attention on or off, whichever is faster.
Run: python benchmarks/cpu_decode.py --peer-python PYTHON [--rows hybrid-int8-512 …]
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from cpu_peer import THEIRS, clocked, compare, limits, main, their_bytes, turns

from whimbrel.engine.bench import Task

DEPTHS = (512, 4096, 16384)
TRIAL, SECONDS = 8, 1.0


def together(shape: str, dtype: str, depth: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """A row: `batch` sequences of `depth` tokens get a token each, ours and llama.cpp in turn."""
    peer, file = options.peer, options.models.gguf(shape, THEIRS[dtype])
    task = Task(options.models.ours(shape, dtype), depth, batch)
    one = clocked(task.decode, 2) / 2
    steps = max(4, min(64, round(SECONDS / one)))
    room = {"context": depth + 96, "sequences": batch, "ubatch": 512}
    choices = [{"file": file, "flash": flash, **room} for flash in (True, False)]
    best, tried = peer.fastest(choices, lambda _: peer.ask("decode", depth=depth, batch=batch, steps=TRIAL))
    before = limits()
    seconds = turns(
        {
            "whimbrel": lambda: clocked(task.decode, steps),
            "llama.cpp": lambda: peer.ask("decode", depth=depth, batch=batch, steps=steps),
        },
        options.repeats,
    )
    bandwidth, peak = map(max, before, limits())
    states = task.state.bytes()["conv"] + task.state.bytes()["ssm"]
    moved = {"whimbrel": task.bytes("decode"), "llama.cpp": their_bytes(file, depth, batch, states)}
    return compare(
        steps * batch,
        seconds,
        {side: steps * size / bandwidth for side, size in moved.items()},
        {
            "steps": steps,
            "bytes_per_step": moved,
            "bandwidth": bandwidth,
            "peak": peak,
            "peer": {
                "version": f"llama-cpp-python {peer.version}",
                "file": THEIRS[dtype],
                "threads": options.threads,
                "keys and values": "float16",
                "flash": best["flash"],
                "tried_seconds": tried,
            },
        },
    )


def twins(dtype: str, depth: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """A row: our hybrid beside our dense twin, and the ratio of the bytes that they move."""
    tasks = {shape: Task(options.models.ours(shape, dtype), depth, batch) for shape in ("hybrid", "dense")}
    steps = max(2, round(SECONDS / clocked(tasks["dense"].decode)))
    before = limits()
    ways = {shape: partial(clocked, task.decode, steps) for shape, task in tasks.items()}
    seconds = turns(ways, options.repeats)
    bandwidth, _ = map(max, before, limits())
    moved = {shape: task.bytes("decode") for shape, task in tasks.items()}
    floors = {shape: steps * size / bandwidth for shape, size in moved.items()}
    extra = {"bytes_per_step": moved, "bytes_ratio": moved["dense"] / moved["hybrid"], "bandwidth": bandwidth}
    return compare(steps * batch, seconds, floors, {"steps": steps, **extra})


ROWS = {
    f"{shape}-{dtype}-{depth}": partial(together, shape, dtype, depth, 1)
    for shape in ("hybrid", "dense")
    for dtype in ("float16", "int8", "int4")
    for depth in DEPTHS
}
ROWS["twins-int8-16384"] = partial(twins, "int8", 16384, 1)

if __name__ == "__main__":
    main("cpu_decode", __doc__ or "", ROWS)
