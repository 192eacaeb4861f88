"""Figures from samples: outcome classes, shares, k samples, budgets, pairs."""

from __future__ import annotations

from typing import Any

import pytest

from whimbrel.engine import Sampling
from whimbrel.errors import UserError
from whimbrel.evaluate import results
from whimbrel.evaluate.results import compared, figures, summary
from whimbrel.evaluate.runner import DOWN, Request, score, well_formed
from whimbrel.evaluate.stages import metrics
from whimbrel.evaluate.statistics import share
from whimbrel.evaluate.tasks import Item


def sample(number: int, outcome: str = "correct", **more: Any) -> dict[str, Any]:
    row = {"task": "sums", "id": str(number), "cluster": str(number), "group": "", "sample": 0, "budget": None}
    row |= {"prompt": f"problem {number}", "outcome": outcome, "extracted": None, "thinking_tokens": 4, "tokens": 10}
    return row | {"thinking_ended": "closed", "forced": 0, "closings": 1} | more


def answer(text: str, finish: str = "stop", ended: str = "off", **more: Any) -> dict[str, Any]:
    return {"text": text, "finish": finish, "thinking_ended": ended, "tokens": 3, "closings": 0, "forced": 0} | more


@pytest.mark.parametrize(
    ("made", "outcome"),
    [
        (answer("#### 7"), "correct"),
        (answer("#### 8"), "wrong"),
        (answer("I do not know."), "no answer"),
        (answer("", "length", "length"), "thinking not closed"),
        (answer("", "stop", "length"), "thinking not closed"),  # the model ended its answer inside its thought
        (answer("#### 7 and so on and", "length"), "length"),
        (answer("#### 7\nand so on and", "length"), "correct"),  # cut off behind the answer
        (answer("it may", "length"), "length"),
        (None, DOWN),
    ],
)
def test_outcomes(made: dict[str, Any] | None, outcome: str) -> None:
    item = Item("1", "2+5", "7", "math", "1")
    row = score(Request("sums", item, 0, "2+5", Sampling(), "key"), made, "too long", lambda text: "en")
    assert row["outcome"] == outcome
    assert ("error" in row) == (made is None)


def test_a_grader_that_fails_is_not_a_wrong_answer() -> None:
    item = Item("1", "write", {"instructions": ["no:such"], "arguments": [{}]}, "instructions", "1")
    row = score(Request("rules", item, 0, "write", Sampling(), "key"), answer("text"), None, lambda text: "en")
    assert row["outcome"] == "grader error"
    assert "no:such" in row["error"]


def test_samples_that_could_not_be_made_are_counted_and_in_no_share() -> None:
    found = figures([sample(1), sample(2, "wrong"), sample(3, DOWN), sample(4, "grader error")])
    assert found["accuracy"]["mean"] == 1 / 3
    assert (found["problems"], found["samples"], found["left_out"]) == (4, 4, 1)
    assert found["outcomes"] == {"correct": 1, "wrong": 1, "grader error": 1, DOWN: 1}
    assert "accuracy" not in figures([sample(1, DOWN)])


def test_well_formed_is_one_closing_tag_where_there_was_a_thought() -> None:
    assert well_formed(sample(1))
    assert not well_formed(sample(1, closings=2))
    assert not well_formed(sample(1, closings=0, thinking_ended="length"))
    assert well_formed(sample(1, closings=0, thinking_ended="off"))
    assert well_formed(sample(1, closings=1, thinking_ended="off", forced=8))  # the engine closed an open prompt
    assert not well_formed(sample(1, closings=1, thinking_ended="off"))
    assert figures([sample(1), sample(2, closings=2)])["well_formed"]["mean"] == 0.5


def test_several_samples_of_a_problem() -> None:
    """Problem 1 right in 1 of 4, problem 2 in 3 of 4: pass@2 is (1/2 + 1)/2, the majority decides for 2 alone."""
    rows = [
        sample(id, "correct" if said == "7" else "wrong", extracted=said, sample=number)
        for id, all_said in ((1, "7889"), (2, "7877"))
        for number, said in enumerate(all_said)
    ]
    found = figures(rows)
    assert found["k"] == 4
    assert {k: one["mean"] for k, one in found["pass_at"].items()} == {"1": 0.5, "2": 0.75, "4": 1.0}
    assert found["majority"]["mean"] == 0.5
    assert found["accuracy"] == share([[1, 0, 0, 0], [1, 0, 1, 1]])
    cut = figures([row for row in rows if row["id"] == "2" or row["sample"] < 3])
    assert cut["pass_at"]["4"]["mean"] == 1.0  # of problem 2, which has all four
    assert "k" not in figures([sample(1), sample(2)])


def test_translations_of_a_problem_are_one_cluster_and_groups_are_shown_apart() -> None:
    rows = [
        sample(number, outcome, id=f"{group}-{number}", group=group)
        for number, outcome in ((1, "correct"), (2, "wrong"), (3, "correct"))
        for group in ("de", "en")
    ]
    found = figures(rows)
    assert found["accuracy"] == share([[1, 1], [0, 0], [1, 1]])
    assert found["groups"] == {"de": share([[1], [0], [1]]), "en": share([[1], [0], [1]])}
    assert found["problems"] == 6


def test_instructions_by_prompt_and_alone() -> None:
    rows = [
        sample(1, strict=[True, True], loose=[True, True]),
        sample(2, "wrong", strict=[True, False], loose=[True, True]),
        sample(3, "wrong", strict=[False], loose=[False]),
    ]
    found = {name: one["mean"] for name, one in figures(rows)["instructions"].items()}
    assert found == {
        "prompt_strict": 1 / 3,
        "instruction_strict": 3 / 5,
        "prompt_loose": 2 / 3,
        "instruction_loose": 4 / 5,
    }


def test_a_budget_curve_keeps_its_order_and_its_thoughts() -> None:
    rows = [
        sample(id, "correct" if id <= right else "wrong", budget=budget, thinking_tokens=tokens)
        for budget, right, tokens in ((0, 1, 0), (8, 2, 8), (None, 4, 20))
        for id in (1, 2, 3, 4)
    ]
    curve = summary(rows)["sums"]
    assert [one["budget"] for one in curve] == [0, 8, None]
    assert [one["thinking_tokens"] for one in curve] == [0, 8, 20]
    assert [one["accuracy"]["mean"] for one in curve] == [0.25, 0.5, 1.0]
    flat = metrics({"tasks": {"sums": curve}})["sums"]
    assert list(flat) == ["off", "budget 8", "think"]
    assert flat["budget 8"] == {
        "problems": 4, "left_out": 0, "accuracy": 0.5, "low": curve[1]["accuracy"]["low"],
        "high": curve[1]["accuracy"]["high"], "thinking_tokens": 8.0, "well_formed": 1.0,
    }  # fmt: skip


def test_pairs_are_the_same_problems_under_the_same_budget() -> None:
    before = [sample(id, "correct" if id <= 2 else "wrong") for id in range(1, 11)]
    after = [sample(id, "correct" if id <= 8 else "wrong") for id in range(1, 11)]
    (found,) = compared(before, after)["sums"]
    assert (found["difference"], found["better"], found["worse"], found["pairs"]) == (0.6, 6, 0, 10)
    assert found["p"] == 2 / 64
    assert found["low"] < 0.6 < found["high"]
    other = [row | {"prompt": "another one"} if row["id"] == "10" else row for row in before]
    (found,) = compared([*other[1:], sample(1, DOWN)], after)["sums"]
    assert found["pairs"] == 8
    with pytest.raises(UserError, match="none of these problems"):
        compared([row | {"budget": 0} for row in before], after)


def test_no_evaluation_is_said(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"no samples\.jsonl"):
        results.read_samples(tmp_path)


def test_a_budgets_curve_in_four_figures() -> None:
    def rows(budget: int | None, right: int, thought: int) -> list[dict[str, Any]]:
        outcomes = ["correct"] * right + ["wrong"] * (100 - right)
        return [sample(n, o, budget=budget, thinking_tokens=thought) for n, o in enumerate(outcomes)]

    curve = summary([*rows(None, 90, 40), *rows(0, 30, 0), *rows(8, 20, 10), *rows(32, 80, 30)])["sums"]
    found = results.thinking(curve)
    assert found["half"] == pytest.approx(0.5)  # at 20 tokens, between 10 (0.2) and 30 (0.8)
    assert found["half_between"] == pytest.approx(0.2)  # 0.5 - 0.3; no limit is 0.4 above
    assert found["well_formed"] == 1
    assert found["falls"] < 0 < results.thinking([*curve[:2], curve[2] | {"budget": 64}, curve[3]])["falls"]
    assert results.thinking(curve[:2]) == results.thinking(curve[2:]) == {}
