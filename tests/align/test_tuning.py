"""Rows as the stages read them; those of GSM8K's authors among them. The recipe that uses them, and its files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_world import write

from whimbrel.align.rollout import read_prompts
from whimbrel.align.tuning import read_rows
from whimbrel.errors import UserError
from whimbrel.evaluate.tasks import TaskSettings, read
from whimbrel.pipeline import recipe
from whimbrel.verify import check, judge
from whimbrel.verify.math import ASK

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = Path(os.environ.get("WHIMBREL_BENCHMARKS", ROOT.parent / "shared" / "benchmarks"))
HERE = ROOT / "data" / "benchmarks"
ROW = {"question": "Two and five?", "answer": "2+5 = <<2+5=7>>7 birds.\nSo 7,000 <<7*1000=7000>>grams.\n#### 7,000"}


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_a_solution_of_gsm8k_is_a_conversation_and_a_prompt(tmp_path: Path) -> None:
    """Without the calculator's notes, the number in the form that the prompt asks for; `evaluate` asks the same."""
    file = write(tmp_path / "train.jsonl", [ROW])
    (row,) = read_rows(file, "conversations", ["messages"])
    asked = {"role": "user", "content": "Two and five?" + ASK}
    told = {"role": "assistant", "content": "2+5 = 7 birds.\nSo 7,000 grams.\n\\boxed{7,000}"}
    assert row["messages"] == [asked, told]
    (prompt,) = read_prompts(file, "prompts")
    assert prompt["prompt"] == [asked] and check(prompt["verifier"], told["content"], prompt["answer"])
    (item,) = read("gsm8k", TaskSettings(), file)
    assert item.prompt == asked["content"] and item.expected == prompt["answer"]


@pytest.mark.parametrize("row", [{"question": "a", "answer": "7"}, {"messages": [], "answer": "#### 7"}, {"answer": 7}])
def test_other_rows_stay_as_they_are(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read_rows(write(tmp_path / "rows.jsonl", [row]), "rows", []) == [row]
    with pytest.raises(UserError, match="line 1 has no 'prompt'"):
        read_rows(tmp_path, "rows", ["prompt"])


def test_every_solution_that_comes_along_is_right_by_its_own_verifier() -> None:
    for row in read_prompts(HERE / "gsm8k" / "train.jsonl", "prompts"):
        assert judge("math", row["messages"][1]["content"], row["answer"]).outcome == "correct"
        assert "<<" not in row["messages"][1]["content"]


def test_the_files_that_come_along_are_the_first_rows_with_their_licence() -> None:
    table = {"gsm8k/train.jsonl": 512, "gsm8k/test.jsonl": 100, "ifeval/input_data.jsonl": 60}
    for name, count in table.items():
        assert len(lines(HERE / name)) == count
        assert f"| `{name}` | {count} |" in (HERE / "README.md").read_text(encoding="utf-8")
        assert (HERE / name).with_name("LICENSE").stat().st_size > 1000
        if (BENCHMARKS / name).exists():
            assert lines(HERE / name) == lines(BENCHMARKS / name)[:count]
    asked = [
        {json.loads(line)["question"] for line in lines(HERE / f"gsm8k/{name}.jsonl")} for name in ("train", "test")
    ]
    assert not asked[0] & asked[1]


def test_requests_that_are_learned_from_are_none_of_ifeval() -> None:
    own = {row["prompt"][0]["content"] for row in read_prompts(ROOT / "data" / "asks", "prompts")}
    assert len(own) == 78
    assert not own & {json.loads(line)["prompt"] for line in lines(HERE / "ifeval" / "input_data.jsonl")}


def test_the_recipe_in_both_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """It learns from nothing that it measures with, and every stage that the long form names is there."""
    monkeypatch.chdir(ROOT)
    long = lines(ROOT / "recipes" / "smollm2.long")
    short, whole = (recipe.read("recipes/smollm2.yaml", changes) for changes in ([], long))
    assert (short.name, whole.name) == ("smollm2", "smollm2-long")
    assert [node.name for node in short.nodes] == [node.name for node in whole.nodes]
    learned = {str(path) for node in short.nodes if node.kind in ("sft", "pairs", "dpo", "pretrain", "distill")
               for path in node.inputs.values() if isinstance(path, Path)}  # fmt: skip
    assert learned == {"recipes/smollm2.name", "data/benchmarks/gsm8k/train.jsonl", "data/asks/prompts.jsonl"}
    figures = [node.settings for node in whole.nodes if node.kind == "evaluate"]
    assert len(figures) == 5 and all(one.tasks == figures[0].tasks and one.text == figures[0].text for one in figures)
