"""The stage `speed`: tokens a second against what is remembered, beside a dense twin of the same size.

OUT/speed.json   {"twin": {pattern, parameters}, "rows": [{model, context, batch, tokens_per_second, low, high}]}

The twin has attention and feed-forward layers in turn, of the model's own widths, as many as bring it nearest to the
model's parameters. Its weights are random, which costs the same as learned ones.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from whimbrel.config import Settings
from whimbrel.events import Report
from whimbrel.files import atomic_write
from whimbrel.model.config import ModelConfig

TURNS, SECONDS = 5, 0.1


class SpeedSettings(Settings):
    """How much is remembered, by how many sequences."""

    contexts: tuple[int, ...] = Field(default=(512, 4096, 8192, 16384), min_length=1)
    """Tokens that each sequence holds; beyond the trained length the arithmetic is the same."""
    batches: tuple[int, ...] = Field(default=(1, 16), min_length=1)
    """Sequences at once."""
    threads: int = Field(default=1, ge=1)


def twin(config: ModelConfig) -> ModelConfig:
    """The dense network of the same widths that is nearest in parameters."""
    from whimbrel.model import count

    wanted = count.total(config)
    dense = (replace(config, pattern="*-" * pairs) for pairs in range(1, 2 * len(config.pattern)))
    return min(dense, key=lambda one: abs(count.total(one) - wanted))


def run(settings: SpeedSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Time a step of decoding of the input `model` and of its twin, in turns; returns the gain at each setting."""
    import torch

    from whimbrel.engine.bench import Task
    from whimbrel.model import LanguageModel, count

    torch.set_num_threads(settings.threads)
    own = LanguageModel.load(inputs["model"]).eval()
    models = {"model": own, "dense twin": LanguageModel(twin(own.config)).initialise(0).eval()}
    places = [(context, batch) for batch in settings.batches for context in settings.contexts]
    rows, gains = [], {}
    for done, (context, batch) in enumerate(places):
        report({"event": "progress", "done": done, "total": len(places), "unit": "settings", "text": ""})
        tasks = {name: Task(model, context, batch) for name, model in models.items()}
        rates: dict[str, list[float]] = {name: [] for name in tasks}
        for _ in range(TURNS):
            for name, task in tasks.items():
                rates[name].append(batch * _rate(task))
        for name, found in rates.items():
            rows.append({"model": name, "context": context, "batch": batch, "low": min(found), "high": max(found)}
                        | {"tokens_per_second": statistics.median(found)})  # fmt: skip
        gains[f"{batch} x {context}"] = statistics.median(rates["model"]) / statistics.median(rates["dense twin"])
    shape = models["dense twin"].config
    about = {"pattern": shape.pattern, "parameters": count.total(shape)}
    with atomic_write(out / "speed.json") as file:
        json.dump({"twin": about, "rows": rows}, file, indent=1)
    return {"twin_parameters": about["parameters"], "times": gains}


def _rate(task: Any) -> float:
    """Steps of decoding a second."""
    steps, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < SECONDS or not steps:
        task.decode()
        steps += 1
    return steps / spent
