"""The stages of `align` over ranks: `tuned.py FOLDER`, run by every rank, where `given` holds a taught model and rows.

FOLDER/NAME gets what a stage wrote, FOLDER/objectives.json how far losses and gradients are from those of one rank.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "align"))
from equal import worst
from small import Rows
from small_world import network, vocabulary, write
from test_stages import STAGES, go

from whimbrel.align import grpo, lora
from whimbrel.align.lora import LoraSettings
from whimbrel.align.policy import PolicyBatch, PolicyGradient, log_probs
from whimbrel.align.preference import Preference, read_pairs
from whimbrel.align.reward import Regression, RewardSettings, attach, read_ratings
from whimbrel.model import LanguageModel
from whimbrel.parallel import Axes, applied
from whimbrel.parallel import gradients as sums
from whimbrel.train.objective import CrossEntropy, Objective
from whimbrel.train.step import accumulate

RUNS: dict[str, tuple[str, dict[str, int]]] = {
    "sft": ("sft", {"fsdp": 2}),
    "lora": ("lora", {"fsdp": 2}),
    "lora-cut": ("lora", {"context": 2}),
    "dpo": ("dpo", {"tensor": 2}),
    "rpo": ("rpo", {"fsdp": 2}),
    "reward": ("reward", {"fsdp": 2}),
    "reward-cut": ("reward", {"tensor": 2}),
    "grpo": ("grpo", {"data": 2}),
    "grpo-odd": ("grpo-odd", {"data": 2}),
    "grpo-sharded": ("grpo", {"fsdp": 2}),
    "grpo-cut": ("grpo", {"tensor": 2}),
    "grpo-odd-sharded": ("grpo-odd", {"fsdp": 2}),
    "grpo-odd-cut": ("grpo-odd", {"tensor": 2}),
    "grpo-odd-copies": ("grpo-odd", {"data": 2, "tensor": 2}),
    "grpo-odd-grid": ("grpo-odd", {"fsdp": 2, "tensor": 2}),
}
"""Runs by name: the stage of tests/align/test_stages.py, and its axes."""
GRPO = [name for name in RUNS if name.startswith("grpo")]
ODD = {"groups": 23, "group_size": 3, "max_tokens": 40, "micro_tokens": 1, "updates": 2, "off": 0.2}
"""Prompts, groups and micro-batches that two ranks cannot share evenly; each learns twice from what was drawn."""
STAGES["grpo-odd"] = (grpo.run, grpo.GrpoSettings, ODD)
LOOP = {"steps": 3, "accumulate": 2, "optimizer": {"learning_rate": 1e-4, "weight_decay": 0.0}}


def tuned(stage: str, folder: Path, out: Path, axes: dict[str, int]) -> None:
    """Run a stage for three steps."""
    loop: dict[str, Any] = LOOP | ({"accumulate": 1} if stage.startswith("grpo") else {})
    figures = go(stage, world(folder), out, **loop, parallel=axes)
    assert figures["step"] == LOOP["steps"]


def talks() -> tuple[list[Any], list[Any]]:
    """Pairs and rated conversations of very different lengths; some attributes are not rated."""
    asked = [{"role": "user", "content": "What is " + "+".join(["1"] * (1 + n * n % 19)) + "?"} for n in range(1, 17)]
    pairs = [{"prompt": [one], "chosen": str(n) * (1 + n % 5), "rejected": "no" * (n % 3), "chosen_reward": 1.0 + n % 3}
             for n, one in enumerate(asked)]  # fmt: skip
    rated = [{"messages": [one, {"role": "assistant", "content": str(n)}], "attributes": {"correctness": 4.0 * (n % 2)}}
             for n, one in enumerate(asked)]  # fmt: skip
    rated[3]["attributes"] = {"correctness": -100}
    return pairs, rated


def world(folder: Path) -> dict[str, Path]:
    """The inputs of every stage, written before."""
    names = ("conversations", "prompts", "validation", "pairs", "rated")
    return {"model": folder} | {name: folder / f"{name}.jsonl" for name in names}


def give(folder: Path) -> None:
    """Pairs and ratings beside what is there."""
    for name, rows in zip(("pairs", "rated"), talks(), strict=True):
        write(folder / f"{name}.jsonl", rows)


def away(made: Any, objective: Objective, batches: Sequence[Any], axes: dict[str, int]) -> dict[str, Any]:
    """How far loss and gradients over ranks are from those of one; `made` builds the same model twice."""
    alone: LanguageModel = made()
    spread: LanguageModel = made()
    loss, terms = accumulate(alone, objective, batches, learn=True)
    wanted = {name: p.grad.clone() for name, p in alone.named_parameters() if p.grad is not None}
    with applied(spread, Axes(**axes)) as share:
        seen, found = accumulate(spread, objective, [batches[i] for i in share.mine(len(batches))], learn=True)
        sums.finish(spread, share)
        here = {name: p.grad for name, p in spread.named_parameters() if p.grad is not None}
        assert sorted(here) == sorted(wanted)
        off = {"loss": max(abs(seen - loss), *(abs(found[name] - terms[name]) for name in terms))}
        everywhere = share.collect(off | {"gradient": worst(here, wanted, alone.config, share)})
    return {key: max(one[key] for one in everywhere) for key in everywhere[0]}


def adapted() -> LanguageModel:
    """A model with adapters that do something."""
    model = lora.attach(network(), LoraSettings(rank=3), 0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, module in lora.adapters(model):
            module.lora_B.normal_(0.0, 0.1, generator=generator)
    return model


def headed() -> LanguageModel:
    """A model with a head that does not say 0."""
    model = attach(network(), 1)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        model.get_submodule("reward").weight.normal_(0.0, 0.05, generator=generator)  # type: ignore[union-attr,operator]
    return model


def answers() -> list[PolicyBatch]:
    """Answers of one to six tokens, drawn by another model than the one that learns."""
    draw, batches, other = np.random.default_rng(4), list[PolicyBatch](), network(3)
    for size in (7, 2, 1, 6):
        lengths = tuple(draw.integers(9, 40, size).tolist())
        ends = np.cumsum(lengths)
        rows_R = np.concatenate([np.arange(end - 1 - draw.integers(1, 7), end - 1) for end in ends])
        tokens_T = draw.integers(0, 320, ends[-1])
        gain_R = draw.normal(size=len(rows_R)).astype(np.float32)
        batch = PolicyBatch(tokens_T, lengths, rows_R, tokens_T[rows_R + 1], gain_R, np.zeros_like(gain_R))
        with torch.no_grad():
            away_R = log_probs(other, batch, 1024).numpy()
            near_R = log_probs(network(), batch, 1024).numpy() + draw.normal(0, 0.2, len(rows_R)).astype(np.float32)
        batches.append(replace(batch, old_R=near_R, reference_R=away_R))
    return batches


def objectives() -> dict[str, Any]:
    """Losses and gradients of micro-batches with unequal numbers of tokens."""
    tokenizer, (told, rated) = vocabulary(), talks()
    cuts = [np.arange(0, 7), np.arange(7, 9), np.arange(9, 10), np.arange(10, 16)]
    pairs = read_pairs(told, tokenizer)
    ratings = read_ratings(rated, tokenizer, RewardSettings(weights={"correctness": 1.0}))
    found = {}
    for axes in ({"data": 2}, {"fsdp": 2}, {"tensor": 2}):
        for name in ("dpo", "rpo"):
            batches = [pairs.of(numbers) for numbers in cuts]
            found[f"{name} {axes}"] = away(network, Preference(name, 0.1, 1.0, 0.1), batches, axes)
        found[f"reward {axes}"] = away(headed, Regression(), [ratings.of(numbers) for numbers in cuts], axes)
        found[f"grpo {axes}"] = away(network, PolicyGradient(0.2, 0.28, "k3", 0.1), answers(), axes)
    for axes in ({"data": 2}, {"fsdp": 2}, {"context": 2}):
        found[f"lora {axes}"] = away(adapted, CrossEntropy(), [Rows().batch(i) for i in range(4)], axes)
    return found


def main(folder: Path) -> None:
    """What two ranks do."""
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    found = objectives() if ranks == 2 else {}
    for name, (stage, axes) in RUNS.items():
        if math.prod(axes.values()) == ranks:
            tuned(stage, folder / "given", folder / name, axes)
    if os.environ["RANK"] == "0" and found:
        (folder / "objectives.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
