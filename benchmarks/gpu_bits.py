"""Decoding with weights of few bits: bytes that must move / time, as a share of the measured bandwidth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def decoding(place: Any, bandwidth: float) -> Iterator[dict[str, Any]]:
    """The 9B shape at 4k, rounded to the nearest in int8, int4 and FP8: one sequence to 256."""
    from gpu_floors import BATCHES, BITS, DEPTH, PEERS

    from whimbrel.engine import bench

    context = 64 if place.dry else DEPTH
    for dtype in BITS:
        try:
            place.fresh()
            model = place.model(PEERS[0])
            bench.round_weights(model, dtype, rows=True)
            for batch in (1, 2) if place.dry else BATCHES:
                task = bench.Task(model, context, batch)
                seconds, moved = place.seconds(task.decode, 1.0), task.bytes("decode")
                yield {"dtype": dtype, "batch": batch, "context": context, "seconds": seconds,
                       "tokens_per_second": batch / seconds, "floor_seconds": moved / bandwidth,
                       "share": moved / seconds / bandwidth, "peak_bytes": place.peak_bytes()}  # fmt: skip
                del task
            del model
        except Exception as fault:
            yield {"dtype": dtype, "failed": f"{type(fault).__name__}: {str(fault)[:300]}"}
