"""What the rows of `gpu_measure.py` could be at best on a card, and what `whimbrel plan` predicts: arithmetic alone.

Run: python benchmarks/gpu_floors.py. Every figure is of the real shape; bytes, operations and batches are those of
`engine/plan.py`, `model/count.py` and `train/memory.py`. A row that runs divides by ceilings measured beside it; these
here are the card's own words. `least` and `aim` are the shares that issue 5 asks for, given as what they come to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from whimbrel.engine.plan import plan, prompt_flops
from whimbrel.model import LanguageModel, ModelConfig, count
from whimbrel.model.presets import preset
from whimbrel.train.memory import training_bytes

Record = dict[str, Any]
CAP = 22.06 * 2**30
"""Bytes of an A10G, the card of the Nano 2 report."""
LONG_CAP = 80e9
RULES = ("reserved", "on demand")
BATCHES, DEPTH = (1, 8, 64, 256), 4096
BITS = ("int8", "int4", "fp8")
"""Weights of few bits."""
JOBS = ((8192, 16384), (1024, 8192), (32768, 1024))
LONG = (65536, 1024)
PEERS, LONG_PEERS = ("nemotron-nano-9b-v2", "qwen3-8b"), ("nemotron-h-8b", "llama-3.1-8b")
MOST = 512
"""Sequences of a step at most."""
WHOLE, AFTER, CHUNK = 131_072, 64, 2048
"""Tokens of the long prompt, of its answer, and of a step that reads it."""
PACKED, DOCUMENTS = 8192, 4
ONE_B = replace(preset("nemotron-h-4b"), pattern="M-M-M*-M-M-M-M*-M-M-M-M*-M-", hidden_size=2048,
                intermediate_size=8192, num_attention_heads=16, num_key_value_heads=4, mamba_num_heads=64)  # fmt: skip
TRAINED = {"1B": (ONE_B, False, 0.30, 0.40), "4B": (preset("nemotron-h-4b"), True, 0.35, 0.45)}
"""Shape, whether layers are recomputed (the 4B's activations do not fit without), and the least MFU and the aim."""
LONG_STEPS = (("1B", 131_072), ("hybrid-290m", 524_288), ("1B", 524_288))
SCANS = (("8B", 128, 64, 128), ("9B", 128, 80, 128), ("56B", 256, 64, 256))
"""Name, heads, width, state; 8 groups each."""
LENGTHS = (8192, 131_072, 2048, 32768)


@dataclass(frozen=True)
class Card:
    """Bytes/s, operations/s in bfloat16 and in FP8 (dense), and bytes of memory."""

    bandwidth: float
    peak: float
    fp8: float
    memory: int


H200 = Card(4.8e12, 989e12, 1979e12, 139 * 2**30)


def shape(name: str) -> ModelConfig:
    return ONE_B if name == "1B" else preset(name)


def step_seconds(config: ModelConfig, context: float, batch: int, card: Card) -> float:
    """The least time of one token of each of `batch` sequences that hold `context` tokens."""
    moved = sum(count.decode_bytes(config, int(context), batch).values())
    return max(moved / card.bandwidth, batch * count.flops_per_token(config, context) / card.peak)


def batch_of(config: ModelConfig, limit: float, into: int, out: int, rule: str) -> int:
    """Sequences that `plan` admits: each with room for its whole context, or for the mean one while it answers.

    On demand `plan` itself says how many fit with half a context each; with a prompt to hold the mean is more.
    """
    context = into + out if rule == "reserved" else into + out // 2
    return min(MOST, plan(config, memory=int(limit), context=context).largest_batch)


def served(config: ModelConfig, card: Card, limit: float, into: int, out: int, rule: str) -> Record:
    """Batch, floors of a step at the mean depth and of a prompt, and output tokens/s of prompts and answers in turn."""
    if not (batch := batch_of(config, limit, into, out, rule)):
        return {"batch": 0, "step_seconds": 0.0, "prompt_seconds": 0.0, "tokens_per_second": 0.0}
    step, prompt = step_seconds(config, into + out // 2, batch, card), prompt_flops(config, into) / card.peak
    rate = batch * out / (batch * prompt + out * step)
    return {"batch": batch, "step_seconds": step, "prompt_seconds": prompt, "tokens_per_second": rate}


def long_served(config: ModelConfig, card: Card) -> tuple[int, float, float]:
    """Batch, decoding and prefill tokens/s at best of the long prompts under their cap."""
    into, out = LONG
    batch = min(64, plan(config, memory=int(LONG_CAP), context=into + out).largest_batch)
    return batch, batch / step_seconds(config, into, batch, card), into * card.peak / prompt_flops(config, into)


def scan_floors(
    heads: int, groups: int, width: int, size: int, tokens: int, number: int, card: Card
) -> dict[str, tuple[float, float, float]]:
    """Bytes, operations and the least seconds of the scan `forward` and `forward+backward`; `number` bytes a number.

    In chunks of 64: C B' once a group, scores by x, C by state, x by B; backward two and a half times that.
    """
    read = number * tokens * (heads * width + 2 * groups * size) + 4 * tokens * heads
    written = number * tokens * heads * width
    flops = 2.0 * tokens * (64 * groups * size + 64 * heads * width / 2 + 2 * heads * width * size)
    found = {}
    for name, moved, work in (
        ("forward", read + written, flops),
        ("forward+backward", 3 * read + 3 * written, 3.5 * flops),
    ):
        found[name] = moved, work, max(moved / card.bandwidth, work / card.peak)
    return found


def fp8_gain(config: ModelConfig, context: float, card: Card, ends: int = 4) -> float:
    """The best that FP8 can bring to a step: the products of all but the first and last `ends` layers go faster."""
    parts, middle = count.flops(config, context), replace(config, pattern=config.pattern[ends : config.layers - ends])
    linear, total = count.flops(middle, context)["matmul"], sum(parts.values())
    return (total / card.peak) / (linear / card.fp8 + (total - linear) / card.peak)


def _decode(card: Card) -> Iterator[Record]:
    config = preset(PEERS[0])
    for batch in BATCHES:
        rate = batch / step_seconds(config, DEPTH, batch, card)
        yield {"row": "decode", "batch": batch, "context": DEPTH, "floor_seconds": batch / rate,
               "bytes": sum(count.decode_bytes(config, DEPTH, batch).values()), "tokens_per_second": rate,
               "least": 0.60 * rate, "aim": 0.75 * rate}  # fmt: skip


def _bits(card: Card) -> Iterator[Record]:
    """As `decode`; only FP8 is multiplied in 8 bits."""
    config = preset(PEERS[0])
    for dtype in BITS:
        for batch in BATCHES:
            moved = sum(count.decode_bytes(config, DEPTH, batch, dtype).values())
            work = batch * count.flops_per_token(config, DEPTH) / (card.fp8 if dtype == "fp8" else card.peak)
            seconds = max(moved / card.bandwidth, work)
            yield {"row": "few_bits", "dtype": dtype, "batch": batch, "context": DEPTH, "floor_seconds": seconds,
                   "bytes": moved, "tokens_per_second": batch / seconds,
                   "over_bfloat16": step_seconds(config, DEPTH, batch, card) / seconds}  # fmt: skip


def _peers(card: Card) -> Iterator[Record]:
    for into, out in JOBS:
        row = "peers" if (into, out) == JOBS[0] else "peers_more"
        for limit in (CAP, card.memory):
            for rule in RULES:
                a, b = (served(preset(name), card, limit, into, out, rule) for name in PEERS)
                rates = a["tokens_per_second"], b["tokens_per_second"]
                ratio = rates[0] / rates[1] if rates[1] else 0.0
                yield {"row": row, "cap": limit, "in": into, "out": out, "rule": rule,
                       "batches": [a["batch"], b["batch"]], "step_seconds": [a["step_seconds"], b["step_seconds"]],
                       "prompt_seconds": [a["prompt_seconds"], b["prompt_seconds"]],
                       "tokens_per_second": rates, "predicted_ratio": ratio, "least": 0.9 * ratio}  # fmt: skip


def _long(card: Card) -> Iterator[Record]:
    (batch_a, step_a, read_a), (batch_b, step_b, read_b) = (long_served(preset(name), card) for name in LONG_PEERS)
    yield {"row": "long_prompts", "cap": LONG_CAP, "in": LONG[0], "out": LONG[1], "batches": [batch_a, batch_b],
           "decode_tokens_per_second": [step_a, step_b], "prefill_tokens_per_second": [read_a, read_b],
           "predicted_ratio": step_a / step_b, "predicted_prefill_ratio": read_a / read_b,
           "least": 0.9 * step_a / step_b, "least_prefill": 0.9 * read_a / read_b}  # fmt: skip
    made = plan(preset(PEERS[0]), memory=int(CAP), context=WHOLE + AFTER, prefill_tokens=CHUNK)
    yield {"row": "whole_context", "cap": CAP, "context": WHOLE, "planned_bytes": made.total_bytes, "fits": made.fits,
           "prefill_floor_seconds": prompt_flops(preset(PEERS[0]), WHOLE) / card.peak,
           "floor_seconds": step_seconds(preset(PEERS[0]), WHOLE, 1, card)}  # fmt: skip


def _train(card: Card) -> Iterator[Record]:
    lengths = [PACKED // DOCUMENTS] * DOCUMENTS
    for name, (config, recompute, least, aim) in TRAINED.items():
        flops = PACKED * count.flops_per_token(config, count.mean_context(lengths), training=True)
        parts = {on: training_bytes(LanguageModel(config, device="meta"), lengths, "bfloat16", on) for on in (0, 1)}
        rate = PACKED * card.peak / flops
        yield {"row": "train", "model": name, "parameters": count.total(config), "flops": flops,
               "floor_seconds": flops / card.peak, "tokens_per_second": rate, "least": least * rate, "aim": aim * rate,
               "recompute": recompute, "planned_bytes": sum(parts[recompute].values()),
               "planned_bytes_without_recompute": sum(parts[0].values()),
               "fp8_over_bfloat16": fp8_gain(config, count.mean_context(lengths), card)}  # fmt: skip
    for name, tokens in LONG_STEPS:
        config = shape(name)
        planned = sum(training_bytes(LanguageModel(config, device="meta"), [tokens], "bfloat16", True).values())
        flops = tokens * count.flops_per_token(config, count.mean_context([tokens]), training=True)
        yield {"row": "long_step", "model": name, "tokens": tokens, "planned_bytes": planned,
               "fits": planned <= card.memory, "flops": flops, "floor_seconds": flops / card.peak}  # fmt: skip


def _scan(card: Card) -> Iterator[Record]:
    for name, heads, width, size in SCANS:
        for tokens in LENGTHS:
            for what, (moved, work, seconds) in scan_floors(heads, 8, width, size, tokens, 2, card).items():
                yield {"row": "scan", "model": name, "what": what, "tokens": tokens, "bytes": moved, "flops": work,
                       "bound_by": "bytes" if moved / card.bandwidth == seconds else "operations",
                       "floor_seconds": seconds, "least": seconds / 0.4, "aim": seconds / 0.6}  # fmt: skip


def floors(card: Card = H200) -> list[Record]:
    """Of every row that has one, in the order of the rows' worth."""
    said = {"row": "ceilings"} | asdict(card)
    return [said, *_decode(card), *_peers(card), *_train(card), *_long(card), *_scan(card), *_bits(card)]


def as_text(records: list[Record]) -> str:
    """One line a record."""
    return "\n".join(f"{record['row']:<14} " + " ".join(f"{k}={_said(v)}" for k, v in record.items() if k != "row")
                     for record in records)  # fmt: skip


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_said, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    print(as_text(floors()))
