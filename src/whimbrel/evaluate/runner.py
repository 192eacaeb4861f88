"""From problems to scored samples: what is not on disk yet is generated, then everything is scored.

Requests go through the engine in fixed parts, and a part is kept whole: a run that was killed computes the same batches
as one that was not, and so the same bits.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from whimbrel.engine import Engine, Sampling
from whimbrel.errors import UserError
from whimbrel.evaluate.generations import Generations, key
from whimbrel.evaluate.tasks import Item
from whimbrel.events import Report
from whimbrel.text.thinking import CLOSE
from whimbrel.verify import judge
from whimbrel.verify.instructions import Detect

PARTS = 4
"""A part is this many times the sequences that run at once: what kill -9 can cost."""
DOWN = "infrastructure error"
OUTCOMES = ("correct", "wrong", "no answer", "thinking not closed", "length", "grader error", DOWN)


@dataclass(frozen=True)
class Request:
    """One sample to draw, its budget in `sampling`; `key` is that of its answer."""

    task: str
    item: Item
    sample: int
    prompt: Any
    sampling: Sampling
    key: str


def requests(task: str, items: Sequence[Item], sampling: Sampling, chat: bool, *about: str) -> Iterator[Request]:
    """The `sampling.n` samples of every item. A draw depends on seed, problem and sample, not on other problems.

    `chat` makes a text prompt a user's message; `about` is what else an answer depends on.
    """
    for item in items:
        prompt: Any = item.prompt
        if chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        for sample in range(sampling.n):
            word = f"{sampling.seed} {task} {item.id} {sample}".encode()
            seed = int.from_bytes(hashlib.sha256(word).digest()[:6], "big") if sampling.temperature else 0
            own = replace(sampling, seed=seed, n=1)
            yield Request(task, item, sample, prompt, own, key(prompt, own, *about))


def generate(engine: Engine, wanted: Sequence[Request], store: Generations, report: Report) -> dict[str, str]:
    """Answer what the store lacks, part by part; returns the engine's words for each key that it refused."""
    size, refused = PARTS * engine.max_sequences, {}
    started, tokens = time.perf_counter(), 0
    there = sum(request.key in store for request in wanted)
    if there:
        report({"event": "log", "text": f"{there} of {len(wanted)} answers are there already"})
    for start in range(0, len(wanted), size):
        part = {request.key: request for request in wanted[start : start + size] if request.key not in store}
        rows = []
        for done, (request, row) in enumerate(_answers(engine, list(part.values())), start + 1):
            if isinstance(row, str):
                refused[request.key] = row
                continue
            tokens += row["tokens"]
            rows.append(row | {"key": request.key})
            text = f"{request.task}, {tokens / (time.perf_counter() - started):.0f} tokens/s"
            report({"event": "progress", "done": done, "total": len(wanted), "unit": "answers", "text": text})
        store.add(rows)
    return refused


def _answers(engine: Engine, wanted: Sequence[Request]) -> Iterator[tuple[Request, dict[str, Any] | str]]:
    """Each request with what is kept of its answer, or with the engine's words of refusal, as they are finished.

    `closings` counts the closing tags that were written, the engine's own among them.
    """
    running = {}
    for request in wanted:
        try:
            (running[request.key],) = engine.add(request.prompt, request.sampling)
        except UserError as error:
            yield request, str(error)
    asked = {request.key: request for request in wanted}
    try:
        while running:
            engine.step()
            for key in [key for key, sequence in running.items() if sequence.finish is not None]:
                answer = running.pop(key).answer()
                row = {name: value for name, value in answer.to_dict().items() if name not in ("index", "sample")}
                raw = engine.tokenizer.decode(answer.ids, skip_special=False)
                yield asked[key], row | {"forced": len(answer.forced), "closings": raw.count(CLOSE)}
    finally:
        for sequence in running.values():
            engine.abort(sequence)


def sample_of(request: Request) -> dict[str, Any]:
    """What a sample's row says of the problem, before there is an answer."""
    item = request.item
    row = {"task": request.task, "id": item.id, "group": item.group, "cluster": item.cluster}
    return row | {"sample": request.sample, "budget": request.sampling.thinking_budget, "prompt": request.prompt}


def score(request: Request, made: Mapping[str, Any] | None, refused: str | None, detect: Detect) -> dict[str, Any]:
    """The row of one sample: the problem, the answer, and one of OUTCOMES.

    An answer that was cut off counts as right if its final answer stands in it; else it is `length`, or `thinking not
    closed` where the thought was still open.
    """
    item, row = request.item, sample_of(request)
    if made is None:
        return row | {"expected": item.expected, "outcome": DOWN, "error": refused}
    verdict = judge(item.verifier, made["text"], item.expected, detect)
    outcome: str = verdict.outcome
    if made["thinking_ended"] == "length":
        outcome = "thinking not closed"
    elif made["finish"] == "length" and outcome in ("wrong", "no answer"):
        outcome = "length"
    seen = {"outcome": outcome, "extracted": verdict.extracted, "expected": item.expected}
    return row | seen | dict(verdict.details) | dict(made)


def well_formed(sample: Mapping[str, Any]) -> bool:
    """Exactly one closing tag, or none where there was no thought (Nano 2, arXiv 2508.14444, §3.4)."""
    thought = sample["thinking_ended"] != "off" or sample["forced"] > 0
    return bool(sample["closings"] == thought)
