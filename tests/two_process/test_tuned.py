"""Tuning over two ranks: losses, gradients, trained weights, adapters, references and heads are those of one rank."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import launch
from tuned import RUNS, give, tuned

from whimbrel import config
from whimbrel.align.grpo import GrpoSettings
from whimbrel.align.preference import PreferenceSettings
from whimbrel.align.reward import RewardModel, RewardSettings
from whimbrel.align.sft import SftSettings
from whimbrel.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks made of every stage, and one rank of each."""
    from small_world import build, teach

    place = tmp_path_factory.mktemp("tuned")
    teach(build(place / "given"), place / "given")
    give(place / "given")
    launch("tuned.py", 2, place)
    for stage in sorted({stage for stage, _ in RUNS.values()}):
        tuned(stage, place / "given", place / "alone" / stage, {})
    return place


def records(folder: Path) -> list[dict[str, float]]:
    """The metrics file without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and k != "mfu"} for line in lines]


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_one_rank(folder: Path) -> None:
    """1e-6 absolute and relative in float32, with micro-batches of one to seven pairs of 20 to 70 tokens."""
    found = json.loads((folder / "objectives.json").read_text())
    assert len(found) == 12
    for name, seen in found.items():
        assert seen["loss"] < 1e-6 and seen["gradient"][0] < 1e-6, (name, seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_three_steps_end_in_the_same_weights_and_figures(folder: Path, name: str) -> None:
    """1e-6, a hundredth of what a step of 1e-4 moves a weight; figures within 1e-5 of themselves."""
    stage = RUNS[name][0]
    files = ["model/model.safetensors"]
    files += ["adapter/adapter_model.safetensors"] if stage in ("lora", "rpo") else []
    files += ["head.safetensors"] if stage == "reward" else []
    for file in files:
        ours, theirs = (load_file(place / file) for place in (folder / name, folder / "alone" / stage))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, atol=1e-6, rtol=1e-6, msg=lambda text, key=key: key + text)
    start = load_file(folder / "given" / "model" / "model.safetensors")
    moved = load_file(folder / name / "model" / "model.safetensors")
    assert max((moved[key] - start[key]).abs().max().item() for key in start) > 5e-5
    for mine, alone in zip(records(folder / name), records(folder / "alone" / stage), strict=True):
        if mine["step"] == 1 and "accuracy" in mine:
            del mine["accuracy"], alone["accuracy"]  # of margins that are 0 but for rounding
        assert mine == pytest.approx(alone, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_the_reference_is_that_of_one_rank(folder: Path) -> None:
    """The same batches through the same whole model: the same bits, whoever computed them."""
    for name in ("dpo", "rpo"):
        ours, alone = (np.load(place / "reference.npy") for place in (folder / name, folder / "alone" / name))
        assert np.array_equal(ours, alone) and (alone < 0).all()


@pytest.mark.slow
def test_a_reward_model_of_two_ranks_is_read_by_one(folder: Path) -> None:
    rows = [json.loads(line)["messages"] for line in (folder / "given" / "rated.jsonl").read_text().splitlines()]
    wanted = RewardModel(folder / "alone" / "reward").rewards(rows)
    for name in ("reward", "reward-cut"):
        assert RewardModel(folder / name).rewards(rows) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_grpo_over_ranks_draws_what_one_rank_draws(folder: Path) -> None:
    """All figures of the answers are equal, and there was something to learn and to judge."""
    for name in ("grpo", "grpo-odd"):
        for mine, alone in zip(records(folder / name), records(folder / "alone" / name), strict=True):
            drawn = ("reward", "groups_kept", "cut", "answer_tokens", "thinking_tokens", "accuracy", "accuracy_off")
            assert {key: mine.get(key) for key in drawn} == {key: alone.get(key) for key in drawn}
        steps = [line for line in records(folder / name) if "reward" in line]
        assert len(steps) == 3 and all(0 < line["groups_kept"] < 1 and line["grad_norm"] > 0 for line in steps)
        assert sum("accuracy" in line for line in records(folder / name)) == 2


@pytest.mark.slow
def test_one_rank_goes_on_with_what_two_began(folder: Path, tmp_path: Path) -> None:
    """GRPO from the second of three steps."""
    shutil.copytree(folder / "grpo-odd", tmp_path / "one", ignore=shutil.ignore_patterns("model", "step-00000003"))
    tuned("grpo-odd", folder / "given", tmp_path / "one", {})
    ours, theirs = (
        load_file(place / "model" / "model.safetensors") for place in (tmp_path / "one", folder / "grpo-odd")
    )
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-6, rtol=1e-6)
    assert [line["step"] for line in records(tmp_path / "one")] == [
        line["step"] for line in records(folder / "grpo-odd")
    ]


@pytest.mark.parametrize(
    ("kind", "changes", "say"),
    [
        (SftSettings, {"lora": {"rank": 4}, "train": {"parallel": {"tensor": 2}}},
         r"is 2, but adapters \(lora\) are not cut; set train.parallel.tensor to 1 and train.parallel.data to 2"),
        (PreferenceSettings, {"lora": {}, "train": {"parallel": {"tensor": 4}}}, "adapters .lora. .* set .*data to 4"),
        (PreferenceSettings, {"train": {"accumulate": 2, "parallel": {"context": 2, "data": 2}}},
         "context is 2, but pairs are not cut; set train.parallel.context to 1 and train.parallel.data to 4"),
        (RewardSettings, {"train": {"parallel": {"context": 2}}}, "context is 2, but conversations with one label"),
        (GrpoSettings, {"train": {"parallel": {"fsdp": 2}}}, "draws with a whole model; set .*data to 2"),
        (GrpoSettings, {"groups": 2, "train": {"parallel": {"data": 3}}}, "is 3, more than groups 2; set groups to 3"),
    ],
)  # fmt: skip
def test_axes_that_a_stage_cannot_use_are_refused_at_once(kind: Any, changes: dict[str, Any], say: str) -> None:
    with pytest.raises(UserError, match=say):
        config.parse(kind, changes)
