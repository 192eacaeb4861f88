"""Losses over a vocabulary that lies in parts, against the whole one: the ranks are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from whimbrel import ops
from whimbrel.ops.split import SplitVocabulary

RANKS, V, D, T = 3, 12, 5, 7


@dataclass
class Table:
    """Where threads lay down what they have and take up what all have."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(RANKS))
    laid: list[Any] = field(default_factory=lambda: [None] * RANKS)


@dataclass(frozen=True)
class Seat:
    """One rank at the table."""

    table: Table
    number: int

    def _all(self, x: Tensor) -> Tensor:
        self.table.laid[self.number] = x.clone()
        self.table.barrier.wait(20)
        everything = torch.stack(self.table.laid)
        self.table.barrier.wait(20)
        return everything

    def add(self, x: Tensor) -> Tensor:
        return x.copy_(self._all(x).sum(0))

    def largest(self, x: Tensor) -> Tensor:
        return x.copy_(self._all(x).amax(0))

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(list(self._all(x)), -1)


def together(weight_VD: Tensor, work: Callable[[SplitVocabulary], Any]) -> list[Any]:
    """Do it on every rank, each with its rows."""
    table, size = Table(), V // RANKS
    parts = [SplitVocabulary(weight_VD[r * size : (r + 1) * size], r * size, Seat(table, r)) for r in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(work, parts))


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("loss", ["cross_entropy", "log_prob", "kl", "kl of a split teacher"])
def test_values_and_gradients_are_those_of_the_whole(loss: str, chunk: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, D, dtype=torch.float64), 3 * torch.randn(V, D, dtype=torch.float64)
    teacher_TD, teacher_VD = torch.randn(T, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    targets, up = torch.tensor([0, 11, 3, -100, 4, 7, 8]), torch.randn(T, dtype=torch.float64)

    def run(hidden: Tensor, matrix: Any, of: Any) -> Tensor:
        if loss.startswith("kl"):
            return ops.kl(hidden, matrix, teacher_TD, of, chunk)
        return getattr(ops, loss)(hidden, matrix, targets, chunk)

    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    wanted = run(whole[0], whole[1], teacher_VD)
    (wanted * up).sum().backward()

    def part(split: SplitVocabulary) -> tuple[Tensor, Tensor, Tensor]:
        mine = [hidden.clone().requires_grad_(), split.weight_vD.clone().requires_grad_()]
        own = SplitVocabulary(mine[1], split.first, split.ranks)
        taught = SplitVocabulary(own.rows_of(teacher_VD), split.first, split.ranks) if "split" in loss else teacher_VD
        seen = run(mine[0], own, taught)
        (seen * up).sum().backward()
        assert mine[0].grad is not None and mine[1].grad is not None
        return seen.detach(), mine[0].grad, mine[1].grad

    found = together(weight, part)
    for seen, dhidden, _ in found:
        torch.testing.assert_close(seen, wanted.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dhidden, whole[0].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([dweight for _, _, dweight in found]), whole[1].grad, rtol=1e-12, atol=1e-12)


def test_logits_of_the_whole_vocabulary_and_no_rows_at_all() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, D), torch.randn(V, D)
    for seen in together(weight, lambda split: ops.linear(hidden, split)):
        torch.testing.assert_close(seen, hidden @ weight.t())
    empty, none = torch.randn(0, D, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    for seen in together(weight, lambda split: ops.cross_entropy(empty, split, none)):
        assert seen.shape == (0,) and seen.requires_grad
