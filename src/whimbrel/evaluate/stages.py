"""The stage `evaluate`: a model and problems in, scored answers out.

OUT/samples.jsonl     one line a sample: problem, answer, outcome, what was read, tokens, time
OUT/results.json      figures with intervals, by task and budget; loss by position; the comparison with `baseline`
OUT/../generations/   answers by what they depend on, for every stage of a run (`generations` names another place)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from whimbrel.config import Settings
from whimbrel.data.language import detect
from whimbrel.engine import Engine, Sampling
from whimbrel.errors import UserError
from whimbrel.evaluate import results
from whimbrel.evaluate.generations import Generations, digest
from whimbrel.evaluate.loss import LossSettings, by_position
from whimbrel.evaluate.needle import NeedleSettings, needles
from whimbrel.evaluate.runner import Request, generate, requests, score
from whimbrel.evaluate.tasks import TaskSettings, read
from whimbrel.events import Report
from whimbrel.files import atomic_write
from whimbrel.model import LanguageModel
from whimbrel.text import Tokenizer

NEEDLE_TOKENS = 32
"""Tokens of an answer to a needle at most."""


class EvaluateSettings(Settings):
    """What is asked, and how answers are drawn; the words of sampling are those of `whimbrel.Sampling`."""

    tasks: dict[str, TaskSettings] = Field(default={})
    """Sets of problems by name, from the input `tasks`."""
    needle: NeedleSettings = NeedleSettings()
    text: LossSettings = LossSettings()
    """Where the input `text` is given."""
    budgets: tuple[int | None, ...] = Field(default=(None,), min_length=1)
    """Thinking budgets, each a run over all problems: null no limit, 0 off."""
    samples: int = Field(default=1, ge=1)
    """Answers to each problem: k of avg@k, maj@k, pass@k."""
    max_tokens: int = Field(default=512, ge=1)
    """Tokens of an answer at most, thought included."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    thinking_grace: int = Field(default=500, ge=0)
    """Tokens after the budget in which a line break is awaited."""
    chat: bool = True
    """A text prompt becomes a user's message where the tokenizer has a chat template."""
    dtype: str = "float32"
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:1`."""
    batch: int = Field(default=16, ge=1)
    """Sequences at once; kill -9 costs at most four times as many answers."""
    threads: int = Field(default=1, ge=1)
    """Threads of the CPU."""
    generations: Path | None = None
    """Folder in which answers are kept; null: `generations` beside the output."""
    seed: int = Field(default=0, ge=0)


def run(settings: EvaluateSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Answer and score every problem; returns the figures that matter. Goes on from the answers that are kept."""
    check(settings, inputs)
    before = results.read_samples(inputs["baseline"]) if "baseline" in inputs else None
    problems = {name: read(name, task, inputs["tasks"]) for name, task in settings.tasks.items()}
    torch.set_num_threads(settings.threads)
    source = inputs["model"] / "model"  # where a stage keeps its checkpoint
    folder = source if source.is_dir() else inputs["model"]
    model = LanguageModel.load(folder, dtype=settings.dtype, device=settings.device).eval()
    tokenizer = Tokenizer.load(folder)
    engine = Engine(model, tokenizer, max_sequences=settings.batch, report=report)
    chat, key = settings.chat and tokenizer.chat_template is not None, digest(folder)
    wanted: list[Request] = []
    names = ("temperature", "top_p", "top_k", "thinking_grace", "seed")
    drawn = {name: getattr(settings, name) for name in names} | {"n": settings.samples}
    for budget in settings.budgets:
        for name, items in problems.items():
            most = settings.tasks[name].max_tokens or settings.max_tokens
            sampling = Sampling(max_tokens=most, thinking_budget=budget, **drawn)
            wanted += requests(name, items, sampling, chat, key, settings.dtype)
    if settings.needle.lengths:
        items = needles(settings.needle, lambda text: len(tokenizer.encode(text)), settings.seed)
        wanted += requests("needle", items, Sampling(max_tokens=NEEDLE_TOKENS), False, key, settings.dtype)
    with Generations((settings.generations or out.parent / "generations") / f"{key}.jsonl") as store:
        refused = generate(engine, wanted, store, report)
        samples = [
            score(request, store.get(request.key), refused.get(request.key), lambda text: detect(text)[0])
            for request in wanted
        ]
    with atomic_write(out / results.SAMPLES) as file:
        file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    made: dict[str, Any] = {"schema": 1, "model": key, "tasks": results.summary(samples)}
    if "text" in inputs:
        made["text"] = by_position(model, tokenizer, settings.text, inputs["text"], report)
    if before is not None:
        made["compared"] = results.compared(before, samples)
    with atomic_write(out / results.FILE) as file:
        json.dump(made, file, indent=2)
    return metrics(made)


def check(settings: EvaluateSettings, inputs: Mapping[str, Path]) -> None:
    """Refuse what cannot work before a model is loaded."""
    if not settings.tasks and not settings.needle.lengths and "text" not in inputs:
        raise UserError("there is nothing to evaluate; set tasks or needle.lengths, or give the input text")
    if settings.tasks and "tasks" not in inputs:
        raise UserError("tasks are set, but the input tasks is not given; add --input tasks=FOLDER")
    if settings.samples > 1 and not settings.temperature:
        raise UserError(f"samples is {settings.samples} with temperature 0, all the same; set temperature to 0.6")


def metrics(made: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says: of each task (under its last budget) problems, accuracy and thought, and the loss."""
    found: dict[str, Any] = {}
    for name, curve in made["tasks"].items():
        last = curve[-1]
        found[name] = {"problems": last["problems"], "left_out": last["left_out"]}
        if "accuracy" in last:
            found[name] |= {"accuracy": last["accuracy"]["mean"], "thinking_tokens": last["thinking_tokens"]}
    if "text" in made:
        found["text"] = {"loss": made["text"]["loss"]["mean"], "perplexity": made["text"]["perplexity"]}
    return found
