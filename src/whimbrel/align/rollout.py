"""Answers to prompts that carry their own truth: drawn from a model, judged by the verifier that each row names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from whimbrel.engine import Engine, Sampling
from whimbrel.engine.answer import Answer
from whimbrel.verify import check

PROMPT_KEYS = ("prompt", "answer", "verifier")


def reward(row: Mapping[str, Any], answer: Answer) -> float:
    """1 for a finished answer that the row's verifier takes, else 0."""
    return float(answer.finish == "stop" and check(row["verifier"], answer.text, row["answer"]))


def accuracy(engine: Engine, rows: Sequence[Mapping[str, Any]], sampling: Sampling) -> float:
    """Mean reward of the rows' prompts, one answer each."""
    answers = engine.generate([row["prompt"] for row in rows], sampling)
    return sum(reward(row, answer) for row, answer in zip(rows, answers, strict=True)) / len(rows)
