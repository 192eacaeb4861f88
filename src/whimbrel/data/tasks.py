"""The stage `tasks`: problems that a rule makes, solves step by step, and checks. One family: chains of sums.

    What is 7+5-9+2?        thought: 7+5=12        answer: 5
                                     -9=3
                                     +2=5

A line a step, because a thought whose budget is spent is closed at a line break. To which part a problem belongs
(training, validation, test) is decided by a digest of its text, so parts are disjoint by content whatever seed, size or
range of lengths they were drawn with, in this run or another.

OUT/conversations.jsonl   {"messages"} of the training part, thoughts written out: for `sft`
OUT/prompts.jsonl         {"prompt", "answer", "verifier"} of the training part: for `grpo` and `pairs`
OUT/validation.jsonl, OUT/test.jsonl   the same of the other two
OUT/documents.parquet     the conversations as plain text: for `tokenizer`
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from whimbrel.config import Settings
from whimbrel.data import documents
from whimbrel.errors import UserError
from whimbrel.events import Report
from whimbrel.files import atomic_write
from whimbrel.text.chat import render_pieces

Part = Literal["train", "validation", "test"]
SHARES: dict[Part, float] = {"validation": 0.1, "test": 0.1}  # of all problems there are; the rest trains
PATIENCE = 200  # draws without a new problem, after which the family counts as used up


class TasksSettings(Settings):
    """Stage `tasks`: how many problems of which size."""

    terms: tuple[int, int] = (5, 8)
    """Fewest and most numbers of a sum; lengths are equally frequent."""
    digits: int = Field(default=1, ge=1, le=6)
    """Digits of a number; none is 0."""
    conversations: int = Field(default=40_000, ge=0)
    """Solved problems to learn from."""
    prompts: int = Field(default=4096, ge=0)
    """Problems to try, without their solution."""
    validation: int = Field(default=512, ge=0)
    test: int = Field(default=1000, ge=0)
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class Problem:
    """A question, the steps to its answer (a line each), and the answer."""

    question: str
    thought: str
    answer: str
    terms: int

    def conversation(self) -> dict[str, Any]:
        """A row to learn from."""
        answer = {"role": "assistant", "thinking": self.thought, "content": self.answer}
        return {"messages": [{"role": "user", "content": self.question}, answer], "terms": self.terms}

    def prompt(self) -> dict[str, Any]:
        """A row to try."""
        asked = [{"role": "user", "content": self.question}]
        return {"prompt": asked, "answer": self.answer, "verifier": "exact", "terms": self.terms}


def chain_sum(draw: random.Random, terms: tuple[int, int], digits: int) -> Problem:
    """A sum of a chain of positive numbers with signs between them, solved from left to right."""
    numbers = [draw.randint(10 ** (digits - 1), 10**digits - 1) for _ in range(draw.randint(*terms))]
    total, text, steps = numbers[0], str(numbers[0]), [str(numbers[0])]
    for number in numbers[1:]:
        signed = draw.choice((number, -number))
        total += signed
        text += f"{signed:+d}"
        steps.append(f"{signed:+d}={total}")
    thought = "\n".join([steps[0] + steps[1], *steps[2:]])
    return Problem(f"What is {text}?", thought, str(total), len(numbers))


def part_of(question: str) -> Part:
    """The part that a problem belongs to, by the digest of its text alone."""
    place = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64
    for part, share in SHARES.items():
        if place < share:
            return part
        place -= share
    return "train"


def draw(settings: TasksSettings, part: Part, count: int, salt: str = "") -> Iterator[Problem]:
    """`count` different problems of one part. UserError where there are not so many."""
    numbers = random.Random(f"{settings.seed} {part} {salt}")
    seen: set[str] = set()
    missed = 0
    while len(seen) < count:
        problem = chain_sum(numbers, settings.terms, settings.digits)
        if problem.question in seen or part_of(problem.question) != part:
            missed += 1
            if missed > PATIENCE:
                raise UserError(
                    f"terms {list(settings.terms)} of digits {settings.digits} make fewer than {count} problems for "
                    f"{part}; set {part if part != 'train' else 'conversations'} to {len(seen)}, or terms higher"
                )
            continue
        missed = 0
        seen.add(problem.question)
        yield problem


def run(settings: TasksSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Write the five files; returns the number of rows of each."""
    least, most = settings.terms
    if not 2 <= least <= most:
        raise UserError(f"terms is {[least, most]}; set terms to two numbers from 2 up, such as [5, 8]")
    solved = list(draw(settings, "train", settings.conversations))
    files: dict[str, list[dict[str, Any]]] = {
        "conversations": [problem.conversation() for problem in solved],
        "prompts": [problem.prompt() for problem in draw(settings, "train", settings.prompts, "prompts")],
        "validation": [problem.prompt() for problem in draw(settings, "validation", settings.validation)],
        "test": [problem.prompt() for problem in draw(settings, "test", settings.test)],
    }
    for name, rows in files.items():
        with atomic_write(out / f"{name}.jsonl") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    with documents.writing(out / "documents.parquet", documents.DOCUMENTS) as table:
        for row in files["conversations"]:
            table.add(_document(row["messages"]))
    counts = {name: len(rows) for name, rows in files.items()}
    report({"event": "log", "text": ", ".join(f"{name} {count:,}" for name, count in counts.items())})
    return counts


def _document(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """A conversation as it is rendered, without the special tokens: what a vocabulary can be learned from."""
    text = re.sub(r"<SPECIAL_\d+>", "", "".join(piece.text for piece in render_pieces(messages)))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"id": digest, "text": text, "source": "chain_sum", "license": "Apache-2.0", "characters": len(text)}
