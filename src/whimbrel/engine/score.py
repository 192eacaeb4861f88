"""Log-probabilities of given tokens: one pass over packed texts, no sampling, no state. T tokens, R rows asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from whimbrel import ops
from whimbrel.model.language import LanguageModel
from whimbrel.model.layout import Layout

Pair = tuple[Sequence[int], Sequence[int]]


def score_pairs(model: LanguageModel, pairs: Sequence[Pair], tokens: int) -> list[list[float]]:
    """For each (prompt ids, continuation ids) the natural log-probability of each continuation id, given all before it.

    Texts are packed to about `tokens` tokens a pass; a longer one gets a pass of its own. A prompt holds at least one
    id.
    """
    scores: list[list[float]] = []
    for batch in _batches(pairs, tokens):
        scores.extend(_score(model, batch))
    return scores


def _batches(pairs: Sequence[Pair], tokens: int) -> Iterator[list[Pair]]:
    batch: list[Pair] = []
    size = 0
    for pair in pairs:
        length = len(pair[0]) + len(pair[1])
        if batch and size + length > tokens:
            yield batch
            batch, size = [], 0
        batch.append(pair)
        size += length
    if batch:
        yield batch


@torch.inference_mode()
def _score(model: LanguageModel, batch: list[Pair]) -> list[list[float]]:
    device = next(model.parameters()).device
    tokens: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    lengths = []
    for prompt, continuation in batch:
        first = len(tokens) + len(prompt) - 1
        rows.extend(range(first, first + len(continuation)))
        targets.extend(continuation)
        tokens.extend([*prompt, *continuation[:-1]])  # nobody asks what follows the last token
        lengths.append(len(prompt) + max(len(continuation) - 1, 0))
    if not rows:
        return [[] for _ in batch]
    layout = Layout.of(lengths, rows=torch.tensor(rows, device=device), device=device)
    hidden_RD = model(torch.tensor(tokens, device=device), layout)
    targets_R = torch.tensor(targets, device=device)
    logprobs = model.head(hidden_RD, lambda hidden, weight: ops.log_prob(hidden, weight, targets_R)).tolist()
    scores = []
    for _, continuation in batch:
        scores.append(logprobs[: len(continuation)])
        logprobs = logprobs[len(continuation) :]
    return scores
