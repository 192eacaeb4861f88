"""The parts of a report that need more stages than one: how a model stood after each, curves, sizes, thoughts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from whimbrel.pipeline import charts

Manifest = Mapping[str, Any]
SHOWN = 6
"""Samples of an evaluation that are shown, the first ones of each task."""


def gather(folder: Path, made: Sequence[Manifest]) -> dict[str, Any] | None:
    """Everything the section shows; None for a run without evaluations."""
    evaluations = [manifest for manifest in made if manifest["stage"] == "evaluate"]
    if not evaluations:
        return None
    results = {one["name"]: _read(folder / one["name"] / "results.json") for one in evaluations}
    curves = [_budgets(results), _positions(results), *_merges(folder, made), *_speeds(folder, made)]
    asked = [one["name"] for one in evaluations if (folder / one["name"] / "samples.jsonl").stat().st_size]
    return {
        "standing": standing(evaluations, {one["name"]: one for one in made}),
        "curves": [curve for curve in curves if curve],
        "lessons": lessons(folder, made),
        "sizes": [_size(one) for one in made if one.get("probe")],
        "samples": _samples(folder / asked[-1] / "samples.jsonl") if asked else [],
        "asked": asked[-1] if asked else None,
    }


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    """Lines of a stage's metrics file; none where it did not train."""
    path = folder / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def lessons(folder: Path, made: Sequence[Manifest]) -> list[dict[str, Any]]:
    """A small curve of every stage that trained: its loss, or the reward where that is what grows.

    Not of the first `pretrain`, which has a section of its own.
    """
    found: list[dict[str, Any]] = []
    shown = next((one["name"] for one in made if one["stage"] == "pretrain"), None)
    for one in made:
        lines = records(folder, one["name"]) if one["name"] != shown else []
        name = "reward" if one["stage"] == "grpo" else "loss"
        curve = [(float(line["step"]), line[name]) for line in lines if name in line]
        held = [(float(line["step"]), line["validation_loss"]) for line in lines if "validation_loss" in line]
        if not curve:
            continue
        words = "mean reward of the answers drawn" if name == "reward" else "loss"
        found.append({"name": one["name"], "drawn": Markup(charts.small(404, curve, held, words))})
    return found


def standing(evaluations: Sequence[Manifest], made: Mapping[str, Manifest]) -> dict[str, Any]:
    """One row an evaluated model, in the order in which they were made; one column a task and mode.

    A cell is an accuracy with its interval, and the paired `change` from the evaluation it was held against; in the
    column (`text`, `loss`) it is a loss.
    """
    columns: list[tuple[str, str]] = []
    rows: dict[str, dict[str, Any]] = {}
    for one in evaluations:
        source = one["inputs"]["model"]
        name = str(source.get("stage") or source["file"])
        stage = made.get(name, {})
        row = rows.setdefault(name, {"name": name, "seconds": stage.get("wall_seconds"), "cells": {}, "against": None})
        row["memory"] = stage.get("peak_memory_bytes")
        changes = one["metrics"].get("against", {})
        if changes:
            row["against"] = _compared_with(one["inputs"]["against"], made)
        for task, found in one["metrics"].items():
            if task == "text":
                row["cells"]["text", "loss"] = {"loss": found["loss"]}
            for mode in ("think", "off") if task != "against" else ():
                if "accuracy" in found.get(mode, {}):
                    row["cells"][task, mode] = found[mode] | {"change": changes.get(task, {}).get(mode)}
        columns += [place for place in row["cells"] if place not in columns]
    order = {name: number for number, name in enumerate(made)}
    for row in rows.values():
        row["cells"] = [row["cells"].get(place) for place in columns]
    return {"columns": columns, "rows": sorted(rows.values(), key=lambda row: order.get(row["name"], -1))}


def _compared_with(source: Mapping[str, Any], made: Mapping[str, Manifest]) -> str:
    """The model of the evaluation that another was held against; a path, where that is not of this run."""
    if "stage" not in source:
        return str(source["file"])
    return str(made[source["stage"]]["inputs"]["model"].get("stage") or source["stage"])


def _drawn(title: str, note: str, x: str, y: str, series: Mapping[str, Sequence[charts.Bar]]) -> dict[str, Any]:
    wide, narrow = (Markup(charts.lines(width, series, x, y)) for width in (860, 344))
    return {"title": title, "note": note, "wide": wide, "narrow": narrow, "names": list(series)}


def _budgets(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Accuracy against the mean thought, of the first evaluation with several budgets."""
    for found in results.values():
        series = {}
        for task, curve in found.get("tasks", {}).items():
            points = [(one["thinking_tokens"], *_interval(one["accuracy"])) for one in curve if "accuracy" in one]
            if len(points) > 3:
                series[task] = sorted(points)
        if series:
            note = "One point a budget, from thinking off to no limit; bars are 95 % intervals."
            return _drawn("What thinking is worth", note, "mean tokens of thought", "share right", series)
    return None


def _positions(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Loss by position in a text, of every evaluation that read one."""
    series = {
        name: [((part["from"] + part["to"]) / 2, *_interval(part)) for part in found["text"]["positions"]]
        for name, found in results.items()
        if "text" in found
    }
    note = "Held-out text, before and after training on longer texts; bars are 95 % intervals."
    return _drawn("How far it reads", note, "position in the text", "loss, nats per token", series) if series else None


def _merges(folder: Path, made: Sequence[Manifest]) -> list[dict[str, Any]]:
    """The sweep of every merge."""
    found = []
    for one in made:
        if one["stage"] == "merge":
            table = json.loads((folder / one["name"] / "sweep.json").read_text(encoding="utf-8"))
            names = [name for name in table[0] if name not in ("alpha", "mean")]
            series = {name.replace("_", " "): [(line["alpha"], line[name], line[name], line[name]) for line in table]
                      for name in names}  # fmt: skip
            note = "Each point is one model between the two, on validation problems."
            found.append(_drawn("Between two models", note, "share of the second model", "share right", series))
    return found


def _speeds(folder: Path, made: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Tokens a second against the context, one picture a number of sequences."""
    found = []
    for one in made:
        rows = _read(folder / one["name"] / "speed.json")["rows"] if one["stage"] == "speed" else []
        for batch in dict.fromkeys(row["batch"] for row in rows):
            series: dict[str, list[charts.Bar]] = {}
            for row in rows:
                if row["batch"] == batch:
                    bar = (row["context"], row["tokens_per_second"], row["low"], row["high"])
                    series.setdefault(row["model"], []).append(bar)
            title = f"How fast it answers, {batch} at once" if batch > 1 else "How fast it answers"
            note = (
                "Tokens a second by the tokens that each sequence holds, in turns with a dense network of the same "
                "size; bars go from the slowest to the fastest of five."
            )
            found.append(_drawn(title, note, "tokens held", "tokens a second", series))
    return found


def _interval(figure: Mapping[str, float]) -> tuple[float, float, float]:
    return figure["mean"], figure["low"], figure["high"]


def _size(manifest: Manifest) -> dict[str, Any]:
    weights = sum(size for name, size in manifest["files"].items() if name.startswith(f"{manifest['model']}/model")
                  and name.endswith(".safetensors"))  # fmt: skip
    shape = manifest["probe"]["shape"]
    return {"name": manifest["name"], "parameters": shape["parameters"], "bytes": weights,
            "pattern": shape["pattern"], "width": shape["hidden_size"]}  # fmt: skip


def _samples(path: Path) -> list[dict[str, Any]]:
    """The first answers with a thought, of each task."""
    seen: dict[str, list[dict[str, Any]]] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row.get("thinking") and row["budget"] is None and len(seen.setdefault(row["task"], [])) < SHOWN // 2:
                prompt = row["prompt"]
                seen[row["task"]].append({
                    "task": row["task"],
                    "prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"],
                    **{name: row[name] for name in ("thinking", "text", "outcome", "expected")},
                })  # fmt: skip
    return [row for rows in seen.values() for row in rows]
