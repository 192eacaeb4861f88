"""The stage `merge`: a straight line between two models of one shape, and the best point of it on validation prompts.

w = (1 - alpha) first + alpha second for every weight (Nemotron Nano 2, arXiv 2508.14444, section 3.2: alpha swept from
0.1 to 0.9 between a reasoning and a chat checkpoint). OUT/sweep.json holds the whole sweep, the ends included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from whimbrel.align.rollout import accuracy, read_prompts
from whimbrel.align.tuning import check_counts, load
from whimbrel.engine import Engine, Sampling
from whimbrel.errors import UserError
from whimbrel.events import Report
from whimbrel.files import atomic_write
from whimbrel.model import LanguageModel
from whimbrel.model.checkpoint import resolve
from whimbrel.train.stages import check_device, torch_device
from whimbrel.train.threads import using

Scores = dict[str, float]


@dataclass(frozen=True)
class MergeSettings:
    """Which points of the line are tried, and by what they are judged: the mean of all accuracies."""

    alphas: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Shares of the second model."""
    modes: tuple[str, ...] = ("on", "off")
    """Answer with a thought, without, or both; each is an accuracy of its own."""
    prompts: int = 256
    """Prompts of each file, from the first on."""
    max_tokens: int = 512
    sequences: int = 256
    """Answers that grow at once."""
    threads: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.alphas or any(not 0 < alpha < 1 for alpha in self.alphas):
            raise UserError(f"alphas is {list(self.alphas)}; set alphas to shares between 0 and 1, such as [0.3, 0.5]")
        if not self.modes or not set(self.modes) <= {"on", "off"}:
            raise UserError(f"modes is {list(self.modes)}; set modes to [on], [off] or [on, off]")
        check_counts(self, "prompts", "max_tokens", "sequences", "threads")
        check_device(self.device)


@torch.no_grad()
def interpolate(model: LanguageModel, first: Mapping[str, Any], second: Mapping[str, Any], alpha: float) -> None:
    """Set every weight of a model to (1 - alpha) first + alpha second, both by name."""
    for name, weight in model.named_parameters():
        weight.copy_(torch.lerp(first[name].to(weight), second[name].to(weight), alpha))
    model.touch()


def sweep(
    first: LanguageModel, second: LanguageModel, alphas: Sequence[float], score: Callable[[LanguageModel], Scores]
) -> list[Scores]:
    """Scores at alpha = 0, the alphas, and 1, each with `alpha` and the `mean` of its scores.

    `first` is left at the alpha between the ends with the highest mean; of equals, the lowest. UserError where the
    models have different shapes.
    """
    ours, theirs = asdict(first.config), asdict(second.config)
    if different := [name for name in ours if ours[name] != theirs[name]]:
        name = different[0]
        raise UserError(
            f"the models differ in {name} ({ours[name]} and {theirs[name]}); give two that came from the same one"
        )
    start = {name: weight.detach().clone() for name, weight in first.named_parameters()}
    end = dict(second.named_parameters())
    table = []
    for alpha in (0.0, *sorted(alphas), 1.0):
        interpolate(first, start, end, alpha)
        scores = score(first)
        table.append({"alpha": alpha} | scores | {"mean": sum(scores.values()) / len(scores)})
    best = max(table[1:-1], key=lambda line: line["mean"])
    interpolate(first, start, end, best["alpha"])
    return table


def run(settings: MergeSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Merge the inputs `first` and `second`, judged on the prompts of `validation` and of `validation_other`."""
    device = torch_device(settings.device)
    first, tokenizer = load(inputs["first"], device)
    second, _ = load(inputs["second"], device)
    files = {name: read_prompts(inputs[name], "validation")[: settings.prompts]
             for name in ("validation", "validation_other") if name in inputs}  # fmt: skip
    engine = Engine(first, tokenizer, max_sequences=settings.sequences, prefill_tokens=8192, report=report)
    total = len(settings.alphas) + 2
    done = 0

    def score(model: LanguageModel) -> Scores:
        nonlocal done
        done += 1
        found = {}
        for name, rows in files.items():
            for mode in settings.modes:
                sampling = Sampling(settings.max_tokens, thinking_budget=None if mode == "on" else 0)
                found[f"{name}_{mode}"] = accuracy(engine, rows, sampling)
        report({"event": "progress", "done": done, "total": total, "unit": "models", "text": ""})
        return found

    with using(settings.threads):
        table = sweep(first, second, settings.alphas, score)
    with atomic_write(out / "sweep.json") as file:
        json.dump(table, file, indent=1)
    first.save(out / "model", resolve(inputs["first"]))
    return max(table[1:-1], key=lambda line: line["mean"])
