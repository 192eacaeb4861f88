"""The stage `pairs`: answers drawn from a model and ranked by the verifier of their prompt.

OUT/pairs.jsonl   {"prompt", "chosen", "rejected", "chosen_reward", "rejected_reward"}: one pair of each prompt that was
                  answered both rightly and wrongly, for `dpo`
OUT/rated.jsonl   {"messages", "attributes"}: every finished answer with what can be said of it without a reader, from 0
                  to 4: `correctness` by the verifier, `verbosity` by its share of `max_tokens`; for `reward`
OUT/conversations.jsonl   {"messages"}: every right answer, for `sft` (rejection sampling) or `chat-tokens`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whimbrel.align.rollout import read_prompts, reward
from whimbrel.align.tuning import check_counts, load
from whimbrel.engine import Engine, Sampling
from whimbrel.engine.answer import Answer
from whimbrel.errors import UserError
from whimbrel.events import Report
from whimbrel.files import atomic_write
from whimbrel.train.stages import check_device, torch_device
from whimbrel.train.threads import using


@dataclass(frozen=True)
class PairsSettings:
    """How many answers, drawn how."""

    prompts: int = 1024
    """Prompts to answer, from the first on."""
    answers: int = 8
    """Answers to each."""
    temperature: float = 1.0
    max_tokens: int = 512
    sequences: int = 256
    """Answers that grow at once."""
    threads: int = 1
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.answers < 2:
            raise UserError(f"answers is {self.answers}, of which no pair can be made; set answers to 2 or more")
        if self.temperature <= 0:
            raise UserError("temperature is 0, which draws the same answer each time; set temperature to 1")
        check_counts(self, "prompts", "sequences", "threads")
        check_device(self.device)
        self.sampling(0)

    def sampling(self, index: int) -> Sampling:
        """What the engine is asked for, for one prompt."""
        return Sampling(self.max_tokens, self.temperature, n=self.answers, seed=(self.seed << 32) + index)


def message(answer: Answer) -> dict[str, str]:
    """An answer as a message."""
    return {"role": "assistant", "thinking": answer.thinking.strip(), "content": answer.text.strip()}


def run(settings: PairsSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Answer the input `prompts` with the input `model`; returns counts and the mean reward."""
    rows = read_prompts(inputs["prompts"], "prompts")[: settings.prompts]
    model, tokenizer = load(inputs["model"], torch_device(settings.device))
    engine = Engine(model, tokenizer, max_sequences=settings.sequences, prefill_tokens=8192, report=report)
    requests = [settings.sampling(index) for index in range(len(rows))]
    groups: list[list[tuple[float, Answer]]] = [[] for _ in rows]
    with using(settings.threads):
        for answer in engine.generate([row["prompt"] for row in rows], requests):
            groups[answer.index].append((reward(rows[answer.index], answer), answer))
            if answer.sample == settings.answers - 1:
                report(
                    {"event": "progress", "done": answer.index + 1, "total": len(rows), "unit": "prompts", "text": ""}
                )
    pairs, rated, own = [], [], []
    for row, group in zip(rows, groups, strict=True):
        finished = [(gain, answer) for gain, answer in group if answer.finish == "stop" and answer.text.strip()]
        for gain, answer in finished:
            verbosity = 4 * len(answer.ids) / settings.max_tokens
            labels = {"correctness": 4 * gain, "verbosity": round(verbosity, 3)}
            whole = {"messages": [*row["prompt"], message(answer)]}
            rated.append(whole | {"attributes": labels})
            own += [whole] * (gain == 1.0)
        right, wrong = ([answer for gain, answer in finished if gain == wanted] for wanted in (1.0, 0.0))
        if right and wrong:
            pair = {"prompt": row["prompt"], "chosen": [message(right[0])], "rejected": [message(wrong[0])]}
            pairs.append(pair | {"chosen_reward": 1.0, "rejected_reward": 0.0})
    if not pairs:
        raise UserError("no prompt was answered both rightly and wrongly; raise answers or prompts, or give others")
    for name, made in (("pairs", pairs), ("rated", rated), ("conversations", own)):
        with atomic_write(out / f"{name}.jsonl") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in made)
    mean = sum(gain for group in groups for gain, _ in group) / sum(map(len, groups))
    return {"pairs": len(pairs), "rated": len(rated), "conversations": len(own), "reward": mean}
