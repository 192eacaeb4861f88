"""Problems that check themselves: right solutions, parts that share no problem, and the forms that stages read."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from whimbrel import config
from whimbrel.data import documents
from whimbrel.data.tasks import TasksSettings, chain_sum, draw, part_of, run
from whimbrel.errors import UserError
from whimbrel.events import silent
from whimbrel.verify import check

FEW: dict[str, Any] = {"conversations": 300, "prompts": 200, "validation": 60, "test": 80}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("digits", [1, 3])
def test_the_thought_leads_to_the_answer_and_the_answer_is_right(digits: int) -> None:
    for seed in range(200):
        problem = chain_sum(random.Random(seed), (2, 9), digits)
        asked = re.fullmatch(r"What is ([-+\d]+)\?", problem.question)
        assert asked is not None and check("exact", problem.answer, str(eval(asked[1])))
        numbers = re.findall(r"[-+]?\d+", asked[1])
        assert len(numbers) == problem.terms and all(len(number.lstrip("+-")) == digits for number in numbers)
        lines = problem.thought.split("\n")
        assert len(lines) == len(numbers) - 1 and lines[0].startswith(numbers[0] + numbers[1] + "=")
        totals = [line.partition("=")[2] for line in lines]
        assert totals == [str(sum(map(int, numbers[:end]))) for end in range(2, len(numbers) + 1)]
        assert "".join(line.partition("=")[0] for line in lines) == asked[1]
        assert totals[-1] == problem.answer


def test_parts_share_no_problem_whatever_was_asked_for(tmp_path: Path) -> None:
    """Overlapping lengths and two seeds: what one run trains on, no other run judges by."""
    parts: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for seed, terms in ((0, [2, 4]), (1, [3, 6])):
        out = tmp_path / str(seed)
        out.mkdir()
        assert run(config.parse(TasksSettings, FEW | {"terms": terms, "seed": seed}), {}, out, silent) == FEW
        asked = {name: [row["prompt"][0]["content"] for row in rows(out / f"{name}.jsonl")]
                 for name in ("prompts", "validation", "test")}  # fmt: skip
        asked["conversations"] = [row["messages"][0]["content"] for row in rows(out / "conversations.jsonl")]
        for name, some in asked.items():
            assert len(set(some)) == len(some) == FEW[name]
            parts["train" if name in ("prompts", "conversations") else name] |= set(some)
            assert {row["terms"] for row in rows(out / f"{name}.jsonl")} == set(range(terms[0], terms[1] + 1))
    assert not parts["train"] & parts["validation"] and not parts["test"] & (parts["train"] | parts["validation"])


def test_a_tenth_of_all_problems_each_is_kept_from_training() -> None:
    found = Counter(part_of(f"What is {a}+{b}-{c}?") for a in range(20) for b in range(20) for c in range(20))
    assert found["validation"] == pytest.approx(800, rel=0.15) and found["test"] == pytest.approx(800, rel=0.15)


def test_files_are_the_same_again_and_lengths_equally_frequent(tmp_path: Path) -> None:
    settings = config.parse(TasksSettings, FEW | {"terms": [5, 8], "conversations": 2000})
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run(settings, {}, tmp_path / name, silent)
    for file in ("conversations.jsonl", "prompts.jsonl", "validation.jsonl", "test.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    lengths = Counter(row["terms"] for row in rows(tmp_path / "a" / "conversations.jsonl"))
    assert min(lengths.values()) > 400
    texts = [row["text"] for row in documents.read(tmp_path / "a")]
    assert len(texts) == 2000 and "SPECIAL" not in texts[0] and "<think>" in texts[0]


def test_more_problems_than_there_are() -> None:
    with pytest.raises(UserError, match=r"fewer than 50 problems for test; set test to \d+, or terms higher"):
        list(draw(config.parse(TasksSettings, {"terms": [2, 2]}), "test", 50))


def test_terms_that_make_no_sum(tmp_path: Path) -> None:
    for terms in ([1, 3], [5, 4]):
        with pytest.raises(UserError, match=r"terms is .*; set terms to two numbers from 2 up"):
            run(config.parse(TasksSettings, {"terms": terms}), {}, tmp_path, silent)
