"""Answers of a small model, many at once: what rollouts and evaluations of recipes/nano-tiny.yaml wait for.

The shape of that recipe with random weights, 256 sequences at once, prompts of about 20 tokens, answers of 30 to 90 at
temperature 1. Beside it the same engine with every operation in torch. Processor seconds of one thread, not wall time,
so that a shared machine disturbs little. Run: python benchmarks/small_engine.py [--prompts 1024] [--repeats 3]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side import record

from whimbrel import Engine, LanguageModel, ModelConfig, Sampling, Tokenizer, ops

SHAPE = ModelConfig(
    "M-M-M*-M-", 512, 64, 256, num_attention_heads=4, num_key_value_heads=2, head_dim=16, mamba_num_heads=4,
    mamba_head_dim=32, ssm_state_size=16, n_groups=2, chunk_size=32, tie_embeddings=True, max_position_embeddings=512,
)  # fmt: skip
SEQUENCES = 256


def main() -> None:
    """Measure both in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pages = [page.read_text() for page in sorted((Path(__file__).parents[1] / "docs").glob("*.md"))]
    tokenizer = Tokenizer.train(pages, SHAPE.vocab_size)
    engine = Engine(LanguageModel(SHAPE).initialise(0), tokenizer, max_sequences=SEQUENCES).start()
    draw = random.Random(0)
    prompts = [" + ".join(str(draw.randint(10, 99)) for _ in range(5)) + " =" for _ in range(options.prompts)]
    wanted = [
        Sampling(max_tokens=draw.randint(30, 90), temperature=1.0, seed=i, ignore_eos=True) for i in range(len(prompts))
    ]

    def run() -> tuple[float, int]:
        """Processor seconds, and tokens written."""
        begin = time.process_time()
        answers = list(engine.generate(prompts, wanted))
        return time.process_time() - begin, sum(len(answer.ids) for answer in answers)

    def in_torch() -> tuple[float, int]:
        with ops.using("torch"):
            return run()

    ways: dict[str, Callable[[], tuple[float, int]]] = {"native": run, "torch": in_torch}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens = 0
    for turn in range(options.repeats + 1):
        for name, way in ways.items():
            took, tokens = way()
            if turn:
                seconds[name].append(took)
    middle = {name: statistics.median(runs) for name, runs in seconds.items()}
    record(
        "small_engine",
        {
            "sequences": SEQUENCES,
            "prompts": len(prompts),
            "tokens": tokens,
            "processor_seconds": seconds,
            "answers_per_processor_second": {name: len(prompts) / s for name, s in middle.items()},
            "ratio": middle["torch"] / middle["native"],
        },
    )


if __name__ == "__main__":
    main()
