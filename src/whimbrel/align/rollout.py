"""Answers to prompts that carry their own truth: drawn from a model, judged by the verifier that each row names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from whimbrel.align.policy import PolicyBatch
from whimbrel.align.tuning import read_rows
from whimbrel.data.language import detect
from whimbrel.engine import Engine, Sampling
from whimbrel.engine.answer import Answer
from whimbrel.errors import UserError
from whimbrel.parallel import Share
from whimbrel.parallel.mesh import ALONE
from whimbrel.verify import Verdict, judge

PROMPT_KEYS = ("prompt", "answer", "verifier")


def read_prompts(source: Path, name: str) -> list[dict[str, Any]]:
    """Rows {"prompt", "answer", "verifier"} of a JSONL file or folder; `UserError` for one that cannot be judged."""
    rows = read_rows(source, name, PROMPT_KEYS)
    for number, row in enumerate(rows, start=1):
        verdict = _judge(row, "x")
        if verdict.outcome == "grader error":
            raise UserError(
                f"{source}, row {number}: the verifier {row['verifier']} cannot judge by {row['answer']!r} "
                f"({verdict.details['error']}); mend its answer"
            )
    return rows


def reward(row: Mapping[str, Any], answer: Answer) -> float:
    """1 for a finished answer that the row's verifier takes, else 0."""
    return float(answer.finish == "stop" and _judge(row, answer.text).outcome == "correct")


def _judge(row: Mapping[str, Any], text: str) -> Verdict:
    return judge(row["verifier"], text, row["answer"], lambda text: detect(text)[0])


def accuracy(engine: Engine, rows: Sequence[Mapping[str, Any]], sampling: Sampling, share: Share = ALONE) -> float:
    """Mean reward of the rows' prompts, one answer each; every rank has a whole engine and answers a part of them."""
    mine = [rows[i] for i in share.dealt(len(rows))]
    answers = engine.generate([row["prompt"] for row in mine], sampling)
    right = sum(reward(row, answer) for row, answer in zip(mine, answers, strict=True))
    return share.total({"": right}, tuple(share.place))[""] / len(rows)


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
