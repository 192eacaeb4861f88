"""The stage `evaluate`: a model and problems in, scored answers out.

OUT/samples.jsonl     one line a sample: problem, answer, outcome, what was read, tokens, time
OUT/results.json      figures with intervals, by task and budget; loss by position; the comparison with `against`
OUT/../generations/   answers by what they depend on, for every stage of a run (`generations` names another place)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from whimbrel.config import Settings
from whimbrel.data.language import detect
from whimbrel.engine import Engine, Sampling
from whimbrel.errors import UserError
from whimbrel.evaluate import results, statistics
from whimbrel.evaluate.generations import Generations, digest
from whimbrel.evaluate.loss import LossSettings, by_position
from whimbrel.evaluate.needle import NeedleSettings, needles
from whimbrel.evaluate.runner import Request, generate, requests, sample_of, score
from whimbrel.evaluate.tasks import Item, TaskSettings, read
from whimbrel.events import Report
from whimbrel.files import atomic_write
from whimbrel.model import LanguageModel
from whimbrel.model.checkpoint import resolve
from whimbrel.text import Tokenizer
from whimbrel.train.stages import check_device, torch_device

NEEDLE_TOKENS = 32
"""Tokens of an answer to a needle at most."""


class EvaluateSettings(Settings):
    """What is asked, and how answers are drawn; the words of sampling are those of `whimbrel.Sampling`."""

    tasks: dict[str, TaskSettings] = Field(default={})
    """Sets of problems by name, from the input `tasks`, or from `tasks.NAME` where several inputs have names."""
    needle: NeedleSettings = NeedleSettings()
    text: LossSettings = LossSettings()
    """Where the input `text` is given."""
    budgets: tuple[int | None, ...] = Field(default=(None,), min_length=1)
    """Thinking budgets, each a run over all problems: null no limit, 0 off, else tokens of thought."""
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
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU where there is one."""
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
    before = results.read_samples(inputs["against"]) if "against" in inputs else None
    problems = {name: read(name, task, place(inputs, name)) for name, task in settings.tasks.items()}
    torch.set_num_threads(settings.threads)
    folder = resolve(inputs["model"])
    model = LanguageModel.load(folder, dtype=settings.dtype, device=torch_device(settings.device)).eval()
    tokenizer, known = Tokenizer.load(folder), digest(folder)
    wanted = ask(settings, problems, tokenizer, known)
    if before is not None and wanted:
        results.check_common(before, map(sample_of, wanted))
    engine = Engine(model, tokenizer, max_sequences=settings.batch, report=report)
    with Generations((settings.generations or out.parent / "generations") / f"{known}.jsonl") as store:
        refused = generate(engine, wanted, store, report)
        samples = [
            score(request, store.get(request.key), refused.get(request.key), lambda text: detect(text)[0])
            for request in wanted
        ]
    with atomic_write(out / results.SAMPLES) as file:
        file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    made: dict[str, Any] = {"schema": 1, "model": known, "tasks": results.summary(samples)}
    if "text" in inputs:
        made["text"] = by_position(model, tokenizer, settings.text, inputs["text"], report)
    if before is not None:
        made["against"] = results.compared(before, samples)
    with atomic_write(out / results.FILE) as file:
        json.dump(made, file, indent=2)
    return metrics(made)


def check(settings: EvaluateSettings, inputs: Mapping[str, Path]) -> None:
    """Refuse what cannot work before a model is loaded."""
    check_device(settings.device)
    if not settings.tasks and not settings.needle.lengths and "text" not in inputs:
        raise UserError("there is nothing to evaluate; set tasks or needle.lengths, or give the input text")
    for name in settings.tasks:
        place(inputs, name)
    if settings.samples > 1 and not settings.temperature:
        raise UserError(f"samples is {settings.samples} with temperature 0, all the same; set temperature to 0.6")


def place(inputs: Mapping[str, Path], task: str) -> Path:
    """The folder in which a set of problems lies."""
    for name in (f"tasks.{task}", "tasks"):
        if name in inputs:
            return inputs[name]
    raise UserError(f"tasks.{task} is set, but no input tasks is given for it; add --input tasks=FOLDER")


def ask(
    settings: EvaluateSettings, problems: Mapping[str, Sequence[Item]], tokenizer: Tokenizer, model: str
) -> list[Request]:
    """Every sample to draw: budget by budget all tasks, then the needles."""
    wanted: list[Request] = []
    chat = settings.chat and tokenizer.chat_template is not None
    names = ("temperature", "top_p", "top_k", "thinking_grace", "seed")
    drawn = {name: getattr(settings, name) for name in names} | {"n": settings.samples}
    for budget in settings.budgets:
        for name, items in problems.items():
            most = settings.tasks[name].max_tokens or settings.max_tokens
            sampling = Sampling(max_tokens=most, thinking_budget=budget, **drawn)
            wanted += requests(name, items, sampling, chat, model, settings.dtype)
    if settings.needle.lengths:
        items = needles(settings.needle, lambda text: len(tokenizer.encode(text)), settings.seed)
        sampling = Sampling(max_tokens=NEEDLE_TOKENS, stop=(".", "\n"))
        wanted += requests("needle", items, sampling, False, model, settings.dtype)
    return wanted


def mode(budget: int | None) -> str:
    """`think` without a limit, `off`, or `budget 64`."""
    return "think" if budget is None else f"budget {budget}" if budget else "off"


def metrics(made: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says, `{task: {mode: {…}}}`: problems, accuracy and its interval, thought, well-formedness.

    `curve` of a task asked under several budgets: `results.thinking`. `text`: loss, perplexity, and how far the loss
    rises within a window, beyond intervals (0 or less: it does not). `against`, again by task and mode: the difference
    in accuracy, its interval, and p.
    """
    found: dict[str, Any] = {
        task: {mode(one["budget"]): _brief(one) for one in curve} for task, curve in made["tasks"].items()
    }
    for task, curve in made["tasks"].items():
        if climb := results.thinking(curve):
            found[task]["curve"] = climb
    if "text" in made:
        rises = statistics.falls(made["text"]["positions"][::-1])
        loss, perplexity = made["text"]["loss"]["mean"], made["text"]["perplexity"]
        found["text"] = {"loss": loss, "perplexity": perplexity, "rises": rises}
    if "against" in made:
        names = ("difference", "low", "high", "p")
        found["against"] = {
            task: {mode(one["budget"]): {name: one[name] for name in names} for one in curve}
            for task, curve in made["against"].items()
        }
    return found


def _brief(figures: Mapping[str, Any]) -> dict[str, Any]:
    found = {"problems": figures["problems"], "left_out": figures["left_out"]}
    if "accuracy" in figures:
        low, high = figures["accuracy"]["low"], figures["accuracy"]["high"]
        found |= {"accuracy": figures["accuracy"]["mean"], "low": low, "high": high}
        found |= {"thinking_tokens": figures["thinking_tokens"], "well_formed": figures["well_formed"]["mean"]}
    return found
