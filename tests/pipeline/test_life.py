"""The section of a report about several models: whose lessons are drawn, and against whom a model is held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from whimbrel.pipeline.life import lessons, standing


def trained(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir()
        lines = [{"step": 0, "validation_loss": 2.0}, {"step": 1, "loss": 1.5, "reward": 0.5}, {"step": 2, "loss": 1.0}]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def manifests(**stages: str) -> list[dict[str, Any]]:
    return [{"name": name, "stage": stage} for name, stage in stages.items()]


def test_the_first_pretraining_has_a_section_of_its_own_and_nothing_else_has(tmp_path: Path) -> None:
    trained(tmp_path, "pretrain", "long", "sft", "grpo")
    made = manifests(data="data", pretrain="pretrain", long="pretrain", sft="sft", grpo="grpo")
    found = lessons(tmp_path, made)
    assert [one["name"] for one in found] == ["long", "sft", "grpo"]
    assert "mean reward" in found[2]["drawn"] and "mean reward" not in found[1]["drawn"]
    assert [one["name"] for one in lessons(tmp_path, made[3:])] == ["sft", "grpo"]


def evaluation(name: str, model: dict[str, str], against: dict[str, str] | None = None) -> dict[str, Any]:
    figure = {"accuracy": 0.5, "low": 0.4, "high": 0.6}
    metrics: dict[str, Any] = {"sums": {"think": figure}}
    inputs = {"model": model}
    if against is not None:
        inputs["against"] = against
        metrics["against"] = {"sums": {"think": {"difference": 0.1, "low": 0.0, "high": 0.2, "p": 0.03}}}
    return {"name": name, "stage": "evaluate", "inputs": inputs, "metrics": metrics}


def test_a_model_is_held_against_a_stage_a_fetched_model_or_a_path() -> None:
    before = evaluation("before", {"file": "smollm2.name"})
    after = evaluation("after", {"stage": "sft"}, {"stage": "before"})
    last = evaluation("last", {"stage": "dpo"}, {"stage": "after"})
    other = evaluation("other", {"stage": "cut"}, {"file": "runs/old/eval"})
    made = {one["name"]: one for one in (before, after, last, other)}
    rows = {row["name"]: row["against"] for row in standing(list(made.values()), made)["rows"]}
    assert rows == {"smollm2.name": None, "sft": "before", "dpo": "sft", "cut": "runs/old/eval"}
