"""Answers to prompts that carry their own truth: drawn from a model, judged by the verifier that each row names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from whimbrel.align.policy import PolicyBatch
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


@dataclass(frozen=True)
class Sample:
    """An answer on its way into a batch."""

    prompt: tuple[int, ...]
    answer: Answer
    advantage: float

    def learned(self) -> list[int]:
        """Places of the tokens that the model chose itself."""
        return [place for place in range(len(self.answer.ids)) if place not in self.answer.forced]


def pack(samples: Sequence[Sample], tokens: int) -> list[PolicyBatch]:
    """Micro-batches of about this many tokens."""
    batches: list[PolicyBatch] = []
    waiting: list[Sample] = []
    size = 0
    for sample in samples:
        length = len(sample.prompt) + len(sample.answer.ids)
        if waiting and size + length > tokens:
            batches.append(_join(waiting))
            waiting, size = [], 0
        waiting.append(sample)
        size += length
    return [*batches, _join(waiting)] if waiting else batches


def _join(samples: Sequence[Sample]) -> PolicyBatch:
    tokens: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    gains: list[float] = []
    drawn: list[float] = []
    for sample in samples:
        ids, logprobs = sample.answer.ids, sample.answer.logprobs
        assert logprobs is not None, "answers to learn from carry their log-probabilities"
        before = len(tokens) + len(sample.prompt) - 1
        tokens += [*sample.prompt, *ids]
        for place in sample.learned():
            rows.append(before + place)
            targets.append(ids[place])
            gains.append(sample.advantage)
            drawn.append(logprobs[place])
    return PolicyBatch(
        np.asarray(tokens),
        tuple(len(sample.prompt) + len(sample.answer.ids) for sample in samples),
        np.asarray(rows, np.int64),
        np.asarray(targets, np.int64),
        np.asarray(gains, np.float32),
        np.asarray(drawn, np.float32),
    )
