"""Tuning over two ranks: losses, gradients, trained weights, adapters, references and heads are those of one rank."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from equal import Tensors, Watch, share_of, undecided
from life import whole
from safetensors.torch import load_file
from small import launch
from small_world import network
from tuned import GRPO, RUNS, give, tuned

from whimbrel import config
from whimbrel.align import grpo
from whimbrel.align.grpo import GrpoSettings
from whimbrel.align.preference import PreferenceSettings
from whimbrel.align.reward import RewardModel, RewardSettings
from whimbrel.align.sft import SftSettings
from whimbrel.errors import UserError
from whimbrel.model import LanguageModel, families
from whimbrel.train.checkpointing import path_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks made of every stage, and one rank of each."""
    from small_world import build, teach

    place = tmp_path_factory.mktemp("tuned")
    teach(build(place / "given"), place / "given")
    give(place / "given")
    launch("tuned.py", 2, place)
    launch("tuned.py", 4, place)
    for stage in sorted({stage for stage, _ in RUNS.values()}):
        if not stage.startswith("grpo"):
            tuned(stage, place / "given", place / "alone" / stage, {})
    return place


@pytest.fixture(scope="module")
def decided(folder: Path) -> dict[str, Tensors]:
    """One rank of GRPO in float32, and another whose policy is in float64 (its engine draws in float32): which weights
    the rounding of float32 decides, by stage and by their names in the files.
    """

    def exact(settings: Any, model: LanguageModel, tokenizer: Any, reference: Any, _: Any) -> grpo.Trainer:
        drawer = LanguageModel.load(folder / "given", dtype="float32")
        return trainer(settings, model.double(), tokenizer, reference and reference.double(), drawer)

    found, trainer, names = dict[str, Tensors](), grpo.Trainer, families.names(network().config)
    for stage in ("grpo", "grpo-odd"):
        seen = {"alone": Watch(), "exact": Watch()}
        for name, watch in seen.items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(grpo, "adamw", watch.adamw)
                if name == "exact":
                    patch.setattr(grpo, "Trainer", exact)
                tuned(stage, folder / "given", folder / name / stage, {})
        assert figures(folder / "alone" / stage) == figures(folder / "exact" / stage)
        left_out = undecided(seen["alone"], seen["exact"], 1e-6)
        assert share_of(left_out) < 1e-3
        found[stage] = {names[ours]: mask for ours, mask in left_out.items()}
        found[stage]["lm_head.weight"] = left_out["embeddings.weight"]  # tied: files hold it under both names
    return found


def figures(folder: Path) -> list[dict[str, Any]]:
    """What was drawn, and how it was judged."""
    drawn = ("reward", "groups_kept", "cut", "answer_tokens", "thinking_tokens", "accuracy", "accuracy_off")
    return [{key: line.get(key) for key in drawn} for line in records(folder)]


def records(folder: Path) -> list[dict[str, float]]:
    """The metrics file without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and k != "mfu"} for line in lines]


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_one_rank(folder: Path) -> None:
    """1e-6 absolute and relative in float32, with micro-batches of one to seven pairs of 20 to 70 tokens."""
    found = json.loads((folder / "objectives.json").read_text())
    assert len(found) == 15
    for name, seen in found.items():
        assert seen["loss"] < 1e-6 and seen["gradient"][0] < 1e-6, (name, seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_three_steps_end_in_the_same_weights_and_figures(folder: Path, name: str, decided: dict[str, Tensors]) -> None:
    """1e-6, a hundredth of what a step of 1e-4 moves a weight; figures within 1e-5 of themselves. Of GRPO, whose groups
    may teach next to nothing, without the weights that float32 decides, at most 0.1 % (`undecided` in equal.py); its
    moments are within 1e-7 everywhere.
    """
    stage = RUNS[name][0]
    left_out = decided.get(stage, {})
    files = ["model/model.safetensors"]
    files += ["adapter/adapter_model.safetensors"] if stage in ("lora", "rpo") else []
    files += ["head.safetensors"] if stage == "reward" else []
    for file in files:
        ours, theirs = (load_file(place / file) for place in (folder / name, folder / "alone" / stage))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            mine = torch.where(left_out[key].view_as(tensor), tensor, ours[key]) if key in left_out else ours[key]
            torch.testing.assert_close(mine, tensor, atol=1e-6, rtol=1e-6, msg=lambda text, key=key: key + text)
    if left_out:
        ours, theirs = (whole(path_of(place / "checkpoints", 3), network()) for place in
                        (folder / name, folder / "alone" / stage))  # fmt: skip
        for key, tensor in theirs.items():
            if "exp_avg" in key:
                torch.testing.assert_close(ours[key], tensor, atol=1e-7, rtol=1e-6)
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
@pytest.mark.usefixtures("decided")
def test_grpo_over_ranks_draws_what_one_rank_draws(folder: Path) -> None:
    """All figures of the answers are equal, and there was something to learn and to judge."""
    for name in GRPO:
        assert figures(folder / name) == figures(folder / "alone" / RUNS[name][0])
        steps = [line for line in records(folder / name) if "reward" in line]
        assert len(steps) == 3 and all(0 < line["groups_kept"] < 1 and line["grad_norm"] > 0 for line in steps)
        assert sum("accuracy" in line for line in records(folder / name)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("began", ["grpo-odd", "grpo-odd-grid"])
def test_one_rank_goes_on_with_what_several_began(folder: Path, tmp_path: Path, began: str) -> None:
    """GRPO from the second of three steps."""
    shutil.copytree(folder / began, tmp_path / "one", ignore=shutil.ignore_patterns("model", "step-00000003"))
    tuned("grpo-odd", folder / "given", tmp_path / "one", {})
    ours, theirs = (load_file(place / "model" / "model.safetensors") for place in (tmp_path / "one", folder / began))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-6, rtol=1e-6)
    assert [line["step"] for line in records(tmp_path / "one")] == [line["step"] for line in records(folder / began)]


@pytest.mark.parametrize(
    ("kind", "changes", "say"),
    [
        (SftSettings, {"lora": {"rank": 4}, "train": {"parallel": {"tensor": 2}}},
         r"is 2, but adapters \(lora\) are not cut; set train.parallel.tensor to 1 and train.parallel.data to 2"),
        (PreferenceSettings, {"lora": {}, "train": {"parallel": {"tensor": 4}}}, "adapters .lora. .* set .*data to 4"),
        (PreferenceSettings, {"train": {"accumulate": 2, "parallel": {"context": 2, "data": 2}}},
         "context is 2, but pairs are not cut; set train.parallel.context to 1 and train.parallel.data to 4"),
        (RewardSettings, {"train": {"parallel": {"context": 2}}}, "context is 2, but conversations with one label"),
        (GrpoSettings, {"train": {"parallel": {"context": 2}}}, "answers are not cut; set .*data to 2"),
        (GrpoSettings, {"groups": 2, "train": {"parallel": {"data": 3}}}, "makes 3 copies .* 2; set groups to 3"),
    ],
)  # fmt: skip
def test_axes_that_a_stage_cannot_use_are_refused_at_once(kind: Any, changes: dict[str, Any], say: str) -> None:
    with pytest.raises(UserError, match=say):
        config.parse(kind, changes)
