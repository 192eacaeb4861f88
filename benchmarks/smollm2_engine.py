"""SmolLM2-135M in our engine beside transformers' generate: decode and prefill, float32 on a CPU, in turns in one run.

The model is what `whimbrel fetch smollm2` fetches, saved as a Hugging Face folder for transformers; without it, random
weights of that shape. Whether both sides write the same greedy tokens is recorded beside the times.
Run: python benchmarks/smollm2_engine.py [--threads 2] [--repeats 5] [--tasks decode prefill batch]
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial

import torch
import transformers
from side_by_side import in_turns, record, summary
from transformers import AutoModelForCausalLM, PreTrainedModel

from whimbrel import Engine, LanguageModel, Sampling, Tokenizer
from whimbrel.errors import UserError
from whimbrel.model import count
from whimbrel.model.fetch import fetched
from whimbrel.model.presets import preset
from whimbrel.ops import machine

TEXT = (
    "A whimbrel is a wading bird with a long curved bill. It breeds in the north and crosses an ocean to winter. " * 40
)
TASKS = ("decode", "prefill", "batch")
PROMPT, NEW, LONG, BATCH = 16, 96, 256, 4


def load() -> tuple[LanguageModel, Tokenizer, str]:
    """The fetched model, or random weights in its shape with a vocabulary of bytes."""
    try:
        folder = fetched("smollm2")
        return LanguageModel.load(folder), Tokenizer.load(folder), "SmolLM2-135M-Instruct (Q4_1 weights as float32)"
    except UserError:
        model = LanguageModel(preset("smollm2-135m")).initialise(0)
        return model, Tokenizer.train(["whimbrel"], 320), "random weights in the shape of SmolLM2-135M"


def peer(model: LanguageModel) -> PreTrainedModel:
    """The same weights in transformers, with its fused attention."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def ours(engine: Engine, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy tokens from our engine."""
    answers = engine.generate(prompts, Sampling(max_tokens=new, ignore_eos=True))
    return [list(answer.ids) for answer in answers]


@torch.inference_mode()
def theirs(model: PreTrainedModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy tokens from transformers; prompts of one length, so nothing is padded."""
    ids = torch.tensor(prompts)
    limits = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **limits)[:, ids.shape[1] :].tolist()


def floors(model: LanguageModel) -> dict[str, float]:
    """Least seconds of each task on this machine now: bytes / bandwidth or operations / peak, whichever is longer.

    Measured anew each time (before and after a task, the better counts), because others may be using the machine.
    """
    machine._bandwidth.cache_clear()
    machine._matmul_peak.cache_clear()
    config, speed, peak = model.config, machine.bandwidth(), machine.matmul_peak()

    def decode(batch: int) -> float:
        context = PROMPT + NEW // 2
        moved = sum(count.decode_bytes(config, context, batch, "float32").values())
        return NEW * max(moved / speed, batch * count.flops_per_token(config, context) / peak)

    layers = count.flops_per_token(config, LONG / 2) - count.flops(config, 1)["head"]
    return {"decode": decode(1), "prefill": LONG * layers / peak, "batch": decode(BATCH)}


def main() -> None:
    """Check, time in turns, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer, name = load()
    other = peer(model)
    engine = Engine(model, tokenizer, max_sequences=BATCH, kv_tokens=2048, prefill_tokens=LONG).start()
    ids = [token % model.config.vocab_size for token in tokenizer.encode(TEXT)]
    tasks = {
        "decode": ([ids[:PROMPT]], NEW + 1),
        "prefill": ([ids[:LONG]], 1),
        "batch": ([ids[start : start + PROMPT] for start in range(BATCH)], NEW + 1),
    }
    rows = {}
    for task in args.tasks:
        prompts, new = tasks[task]
        ways = {"ours": partial(ours, engine, prompts, new), "transformers": partial(theirs, other, prompts, new)}
        same = ways["ours"]() == ways["transformers"]()
        before = floors(model)[task]
        times = {side: summary(runs) for side, runs in in_turns(ways, args.repeats, warm_up=0).items()}
        least = min(before, floors(model)[task])
        tokens = len(prompts) * (new - 1) or LONG
        rows[task] = {
            "same_tokens": same,
            "floor_seconds": least,
            "seconds": times,
            "tokens_per_second": {side: tokens / t["median"] for side, t in times.items()},
            "share_of_floor": {side: least / t["median"] for side, t in times.items()},
            "ratio": times["transformers"]["median"] / times["ours"]["median"],
        }
    record(
        "smollm2_engine",
        {
            "model": name,
            "peer": f"transformers {transformers.__version__}, generate, sdpa, dynamic cache",
            "task": {"prompt": PROMPT, "new": NEW, "long_prompt": LONG, "batch": BATCH},
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
