"""Merging: a line between two models, its ends where they belong, and the best point of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import LOOP, network

from whimbrel import config
from whimbrel.align.merge import MergeSettings, interpolate, sweep
from whimbrel.align.merge import run as merge
from whimbrel.align.sft import SftSettings
from whimbrel.align.sft import run as tune
from whimbrel.errors import UserError
from whimbrel.events import silent
from whimbrel.model import LanguageModel

ALPHAS = (0.5, 0.25, 0.75)


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_alpha_is_the_share_of_the_second() -> None:
    first, second, model = weights(network(0)), weights(network(1)), network(2)
    version = model.weights_version
    interpolate(model, first, second, 0.25)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, 0.75 * first[name] + 0.25 * second[name])
    assert model.weights_version > version


def test_a_model_merged_with_itself_is_itself() -> None:
    model, before = network(), weights(network())
    for alpha in (0.1, 0.3, 0.9, 1.0):
        interpolate(model, before, weights(network()), alpha)
        assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_the_sweep_keeps_the_best_point_between_the_ends() -> None:
    first, second = network(0), network(1)
    start, end = weights(first), weights(second)
    name = "norm_f.weight"
    away = float(end[name][0] - start[name][0])
    target = float(start[name][0]) + 0.72 * away  # a score that peaks near 0.72 of the way, and a constant one
    seen = []

    def score(model: LanguageModel) -> dict[str, float]:
        here = float(model.norm_f.weight.detach()[0])
        seen.append((here - float(start[name][0])) / away)
        return {"near": -abs(here - target), "same": 1.0}

    table = sweep(first, second, ALPHAS, score)
    assert seen == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=1e-5)
    assert [row["alpha"] for row in table] == [0, 0.25, 0.5, 0.75, 1]
    assert all(row["mean"] == pytest.approx((row["near"] + 1) / 2) for row in table)
    for key, weight in first.named_parameters():
        torch.testing.assert_close(weight, 0.25 * start[key] + 0.75 * end[key])


def test_of_equals_the_lowest_and_never_an_end() -> None:
    first = network(0)
    table = sweep(first, network(1), ALPHAS, lambda model: {"same": 0.5})
    assert max(table[1:-1], key=lambda row: row["mean"])["alpha"] == 0.25
    start, end = weights(network(0)), weights(network(1))
    for key, weight in first.named_parameters():
        torch.testing.assert_close(weight, 0.75 * start[key] + 0.25 * end[key])


def test_models_of_two_shapes_are_refused() -> None:
    other = LanguageModel(replace(network().config, hidden_size=40)).initialise(0)
    with pytest.raises(UserError, match=r"the models differ in hidden_size \(32 and 40\)"):
        sweep(network(), other, ALPHAS, lambda model: {"same": 0.0})


def test_the_stage_scores_every_point_and_saves_the_best(taught: dict[str, Path], tmp_path: Path) -> None:
    """The second model has learned more; every point is judged on the same prompts in both modes."""
    said = {"length": 256, "off": 0.5, "cut": 0.0, "device": "cpu", "train": LOOP | {"steps": 30}}
    tune(config.parse(SftSettings, said), taught, tmp_path / "second", silent)
    inputs = {"first": taught["model"], "second": tmp_path / "second", "validation": taught["validation"]}
    settings = MergeSettings(alphas=(0.3, 0.6), prompts=8, max_tokens=40, device="cpu")
    best = merge(settings, inputs, tmp_path / "out", silent)
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["alpha"] for row in table] == [0, 0.3, 0.6, 1] and best in table[1:-1]
    assert {"alpha", "validation_on", "validation_off", "mean"} == set(best)
    ends = [LanguageModel.load(folder) for folder in (taught["model"], tmp_path / "second")]
    saved = dict(LanguageModel.load(tmp_path / "out" / "model").named_parameters())
    for (name, a), b in zip(ends[0].named_parameters(), ends[1].parameters(), strict=True):
        torch.testing.assert_close(saved[name], torch.lerp(a, b, best["alpha"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alphas": ()}, r"alphas is \[\]"),
        ({"alphas": (0.5, 1.0)}, "set alphas to shares between 0 and 1"),
        ({"modes": ("of",)}, r"set modes to \[on\], \[off\]"),
        ({"prompts": 0}, "set prompts to 1 or more"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MergeSettings(**changes)
