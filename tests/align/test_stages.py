"""The stages one after another on a tiny model, and each of them killed in the middle: it ends in the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_world import LOOP, lines, write

from whimbrel import config
from whimbrel.align import grpo, merge, pairs, preference, reward, sft
from whimbrel.align.reward import RewardModel
from whimbrel.align.tuning import read_rows
from whimbrel.errors import UserError
from whimbrel.events import silent
from whimbrel.model import LanguageModel

TRAIN = LOOP | {"steps": 5, "checkpoint_every": 2}
STAGES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sft": (sft.run, sft.SftSettings, {"length": 256, "cut": 0.2}),
    "lora": (sft.run, sft.SftSettings, {"length": 256, "lora": {"rank": 4}}),
    "dpo": (preference.run, preference.PreferenceSettings, {"pairs": 4, "heldout": 0.2, "beta": 0.5}),
    "rpo": (preference.run, preference.PreferenceSettings, {"loss": "rpo", "pairs": 4, "lora": {"rank": 4}}),
    "reward": (reward.run, reward.RewardSettings, {"weights": {"correctness": 1.0}, "conversations": 4}),
    "grpo": (grpo.run, grpo.GrpoSettings, {"groups": 24, "group_size": 4, "max_tokens": 40, "kl": "k3"}),
}
"""What runs, its settings, and what is said of them."""


def go(stage: str, inputs: dict[str, Path], out: Path, report: Any = silent, **changes: Any) -> dict[str, Any]:
    """One of the stages; `changes` are settings of its loop."""
    run, kind, said = STAGES[stage]
    made = config.parse(kind, said | {"device": "cpu", "train": TRAIN | changes})
    return dict(run(made, inputs, out, report))


def inputs(world: dict[str, Path], folder: Path) -> dict[str, Path]:
    """The world, with pairs and ratings that need no drawing."""
    asked = [{"role": "user", "content": f"What is {n}+0?"} for n in range(1, 13)]
    told = [{"prompt": [one], "chosen": str(n), "rejected": str(n + 1), "chosen_reward": 1.0 + n % 3}
            for n, one in enumerate(asked, 1)]  # fmt: skip
    rated = [{"messages": [one, {"role": "assistant", "content": str(n)}], "attributes": {"correctness": 4.0 * (n % 2)}}
             for n, one in enumerate(asked, 1)]  # fmt: skip
    made = {"pairs": write(folder / "pairs.jsonl", told), "rated": write(folder / "rated.jsonl", rated)}
    return world | made


def figures(folder: Path) -> list[dict[str, Any]]:
    """The lines of the metrics file without times, and so without rates."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "second" not in name and name != "mfu"} for row in rows]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_the_middle_a_stage_ends_in_the_same_bits(
    taught: dict[str, Path], tmp_path: Path, stage: str
) -> None:
    """Kill -9 in step 3, one step after a checkpoint; the same call goes on and writes the same model and figures."""
    given = inputs(taught, tmp_path)
    whole = go(stage, given, tmp_path / "whole")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import os, pathlib, test_stages\n"
        "def die(event):\n"
        "    if event.get('event') == 'progress' and event['done'] == 3 and event.get('unit') == 'steps':\n"
        "        os.kill(os.getpid(), 9)\n"
        f"given = { ({name: str(path) for name, path in given.items()})!r}\n"
        "given = {name: pathlib.Path(path) for name, path in given.items()}\n"
        f"test_stages.go({stage!r}, given, pathlib.Path({str(tmp_path / 'cut')!r}), die)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "cut" / "model").exists()
    said: list[dict[str, Any]] = []
    again = go(stage, given, tmp_path / "cut", said.append)
    assert any("going on from" in event.get("text", "") for event in said)
    assert sum(event["event"] == "progress" and event.get("unit") == "steps" for event in said) == 3  # steps 3, 4, 5
    for name in ("model/model.safetensors", *(["adapter/adapter_model.safetensors"] if stage == "lora" else [])):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert figures(tmp_path / "whole") == figures(tmp_path / "cut")
    assert whole["step"] == again["step"] == 5


@pytest.mark.parametrize(
    ("stage", "changed"),
    [("dpo", {"beta": 0.1}), ("grpo", {"group_size": 5}), ("reward", {"weights": {"correctness": 1.0, "joy": 1.0}})],
)
def test_work_begun_with_other_settings_is_not_gone_on_with(
    taught: dict[str, Path], tmp_path: Path, stage: str, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(taught, tmp_path)
    go(stage, given, tmp_path / "out", steps=2)
    run, kind, said = STAGES[stage]
    monkeypatch.setitem(STAGES, stage, (run, kind, said | changed))
    with pytest.raises(UserError, match=r"cannot go on|do not fit|was begun with|remove"):
        go(stage, given, tmp_path / "out", steps=2)


def test_from_tuned_to_merged(taught: dict[str, Path], tmp_path: Path) -> None:
    """pairs → dpo, rpo, reward; grpo → merge: each takes what one before it wrote, and does its own work."""
    draw = pairs.PairsSettings(answers=6, max_tokens=40, device="cpu")
    pairs.run(draw, taught, tmp_path / "pairs", silent)
    given = taught | {"pairs": tmp_path / "pairs", "rated": tmp_path / "pairs"}
    for loss in ("dpo", "rpo"):
        go(loss, given, tmp_path / loss, steps=12)
        margins = lines(tmp_path / loss, "margin")
        assert margins[0] == pytest.approx(0, abs=1e-4) and margins[-1] > margins[0] + 0.05
    go("reward", given, tmp_path / "reward", steps=30)
    rated = read_rows(tmp_path / "pairs", "rated", [])
    scores = np.asarray(RewardModel(tmp_path / "reward").rewards([row["messages"] for row in rated]))
    right = np.asarray([row["attributes"]["correctness"] > 0 for row in rated])
    assert scores[right].mean() > scores[~right].mean()
    go("grpo", given, tmp_path / "grpo")
    assert max(lines(tmp_path / "grpo", "drift_max")) < 1e-3
    away = lines(tmp_path / "grpo", "kl")  # from the model at the start, which stays
    assert away[0] == pytest.approx(0, abs=1e-7) and away[-1] > 1e-5
    ends = {"first": taught["model"], "second": tmp_path / "grpo", "validation": taught["validation"]}
    asked = merge.MergeSettings(alphas=(0.5,), prompts=8, max_tokens=40, device="cpu")
    merge.run(asked, ends, tmp_path / "merge", silent)
    first, second, between = (
        dict(LanguageModel.load(folder).named_parameters())
        for folder in (taught["model"], tmp_path / "grpo", tmp_path / "merge")
    )
    moved = 0
    for name, weight in between.items():
        torch.testing.assert_close(weight, torch.lerp(first[name], second[name], 0.5))
        moved += not torch.equal(first[name], second[name])
    assert moved == len(between)
