"""Reading prompts of 512, 4k and 16k tokens beside llama.cpp in its best format at that length.

Both sides read in stretches of 512 tokens. Up to 16k the time of a stretch grows evenly with its depth (attention), so
the first, the middle and the last are timed and the rest lies between. Floor: operations over the measured peak of a
float32 product, for both; int8 arithmetic may go below it. Of llama.cpp every format, flash attention on and off and
stretches of 2,048 are tried.
Run: python benchmarks/cpu_prefill.py --peer-python PYTHON [--rows hybrid-int8-4096 …]
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from cpu_peer import clocked, compare, limits, main, turns

from whimbrel.engine.bench import Task
from whimbrel.engine.plan import prompt_flops

LENGTHS = (512, 4096, 16384)
STRETCH, LONG = 512, 2048


def prompt(shape: str, dtype: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """A row: one prompt of this length."""
    peer, models = options.peer, options.models
    task = Task(models.ours(shape, dtype), length, 1)
    depths = [0] if length == STRETCH else [0, (length - STRETCH) // 2, length - STRETCH]
    weights = [1.0] if length == STRETCH else [0.25, 0.5, 0.25]
    count, middle = length // STRETCH, depths[len(depths) // 2]

    def whole(read: Any) -> float:
        """Seconds of the whole prompt from those of some stretches."""
        return count * sum(w * read(depth) for w, depth in zip(weights, depths, strict=True))

    choices = [
        {"file": models.gguf(shape, kind), "flash": flash, "context": length + 64, "sequences": 1, "ubatch": STRETCH}
        for kind in ("f16", "q8_0", "q4_0")
        for flash in (True, False)
    ]

    def theirs(settings: dict[str, Any], depth: int) -> float:
        """Seconds of llama.cpp for a stretch as long as ours, from one as long as it was set to take."""
        size = settings["ubatch"]
        return peer.ask("chunk", depth=min(depth, length - size), tokens=size) * STRETCH / size

    best, tried = peer.fastest(choices, partial(theirs, depth=middle))
    if length >= LONG:
        best, more = peer.fastest([best, {**best, "ubatch": LONG}], partial(theirs, depth=middle))
        tried |= more
    before = limits()
    seconds = turns(
        {
            "whimbrel": lambda: whole(lambda depth: clocked(partial(task.read, depth, STRETCH))),
            "llama.cpp": lambda: whole(partial(theirs, best)),
        },
        options.repeats,
    )
    _, peak = map(max, before, limits())
    floor = prompt_flops(task.model.config, length) / peak
    return compare(
        length,
        seconds,
        {"whimbrel": floor, "llama.cpp": floor},
        {
            "flops": prompt_flops(task.model.config, length),
            "peak": peak,
            "peer": {
                "version": f"llama-cpp-python {peer.version}",
                "file": best["file"].stem.rpartition("-")[2],
                "threads": options.threads,
                "keys and values": "float16",
                "flash": best["flash"],
                "ubatch": best["ubatch"],
                "tried_seconds": tried,
            },
        },
    )


ROWS = {
    f"{shape}-{dtype}-{length}": partial(prompt, shape, dtype, length)
    for shape in ("hybrid", "dense")
    for dtype in ("float32", "int8", "int4")
    for length in LENGTHS
}

if __name__ == "__main__":
    main("cpu_prefill", __doc__ or "", ROWS)
