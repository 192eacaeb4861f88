"""Rows of packed tokens: what a training step sees.

A row is cut out of token shards and carries its own document pieces, so that no document sees another. Targets are
shifted here, once: the target of a token is the next token of the same document, even where the row ends, and IGNORE
where there is none or where it is not to be learned.

Letters: T packed tokens, D documents, L length of a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from whimbrel.data.order import Permutation
from whimbrel.data.shards import TokenShards
from whimbrel.errors import UserError

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """What one step sees: rows laid end to end."""

    tokens_T: NDArray[np.int64]
    targets_T: NDArray[np.int64]  # IGNORE where nothing is learned; already shifted, never across a document
    lengths: tuple[int, ...]  # tokens of each document piece, T in all
    step: int


@dataclass(frozen=True)
class Row:
    """One packed row: like a batch, without a step."""

    tokens_T: NDArray[np.int64]
    targets_T: NDArray[np.int64]
    lengths: tuple[int, ...]


class Rows(Protocol):
    """Rows in an order that is new in every epoch. `row` is pure in its index, which counts on over the epochs."""

    @property
    def count(self) -> int:
        """Rows in an epoch."""

    def row(self, index: int) -> Row:
        """The row that stands at this place of the order."""

    def tokens_between(self, start: int, stop: int) -> int:
        """Tokens in the rows [start, stop), exactly."""


def join(rows: Sequence[Row], step: int) -> Batch:
    """Lay rows end to end."""
    return Batch(
        tokens_T=np.concatenate([row.tokens_T for row in rows]),
        targets_T=np.concatenate([row.targets_T for row in rows]),
        lengths=tuple(length for row in rows for length in row.lengths),
        step=step,
    )


@dataclass(frozen=True)
class Source:
    """Batches of `batch_rows` rows. `batch` is a pure function of source and step: resume needs the integer."""

    rows: Rows
    batch_rows: int

    def __post_init__(self) -> None:
        if self.batch_rows < 1:
            raise UserError(f"batch_rows is {self.batch_rows}; set it to 1 or more")

    @property
    def length(self) -> int:
        """Rows in an epoch."""
        return self.rows.count

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0; it may straddle two epochs."""
        first = step * self.batch_rows
        return join([self.rows.row(index) for index in range(first, first + self.batch_rows)], step)


@dataclass(frozen=True)
class Windows:
    """The stream of a shard cut every L tokens, wherever documents begin. Every token is in one row of an epoch.

    The last window of the stream is shorter than L unless L divides T; no other row is.
    """

    shards: TokenShards
    length: int
    seed: int
    order: Permutation = field(init=False)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"length is {self.length}; set it to 1 or more tokens")
        object.__setattr__(self, "order", Permutation(self.count, self.seed))

    @property
    def count(self) -> int:
        """Windows in an epoch."""
        return -(-self.shards.tokens // self.length)

    def row(self, index: int) -> Row:
        """The window at this place of the order."""
        start = int(self.order(index)) * self.length
        return cut(self.shards, start, min(start + self.length, self.shards.tokens))

    def tokens_between(self, start: int, stop: int) -> int:
        """Tokens in the rows [start, stop): L each, less where the stream's short last window stands among them."""
        if stop <= start:
            return 0
        missing = self.count * self.length - self.shards.tokens
        epochs = range(start // self.count, (stop - 1) // self.count + 1)
        ends = [epoch * self.count + int(self.order.places(self.count - 1, epoch)) for epoch in epochs]
        return (stop - start) * self.length - missing * sum(start <= end < stop for end in ends)


def cut(shards: TokenShards, start: int, stop: int) -> Row:
    """Tokens [start, stop) of the stream as a row, cut where documents begin."""
    beyond = min(stop + 1, shards.tokens)
    tokens = shards.read(start, beyond)
    targets_T = np.full(stop - start, IGNORE, np.int64)
    following = tokens[1:]
    targets_T[: len(following)] = np.where(shards.learn(start + 1, beyond), following, IGNORE)
    low, high = np.searchsorted(shards.starts_D1, [start + 1, stop + 1])
    begins = shards.starts_D1[low:high]  # documents that begin in (start, stop]
    targets_T[begins - 1 - start] = IGNORE
    cuts = np.unique(np.concatenate([[start], begins, [stop]]))
    return Row(tokens[: stop - start], targets_T, tuple(np.diff(cuts).tolist()))


@dataclass(frozen=True)
class WholeDocuments:
    """Rows of at most L tokens, made of whole documents: in random order, each into the fullest row with
    room (best fit).

    Longest first would fill rows better and put documents of one length, so often of one kind, into one row; nothing
    is padded, so an emptier row costs nothing and a one-sided step does. Longer documents than L are refused: cutting
    a conversation would teach half an answer.
    """

    shards: TokenShards
    length: int
    seed: int

    def __post_init__(self) -> None:
        longest = int(np.diff(self.shards.starts_D1).max())
        if longest > self.length:
            raise UserError(f"length is {self.length}, the longest document has {longest} tokens; set length to that")

    @cached_property
    def bins(self) -> list[list[int]]:
        """Document numbers of every row."""
        sizes_D = np.diff(self.shards.starts_D1)
        bins: list[list[int]] = []
        room: list[tuple[int, int]] = []  # (tokens left, row), sorted
        for document in Permutation(len(sizes_D), self.seed)(np.arange(len(sizes_D))).tolist():
            size = int(sizes_D[document])
            if not size:
                continue
            at = bisect_left(room, (size, 0))
            left, number = room.pop(at) if at < len(room) else (self.length, len(bins))
            if number == len(bins):
                bins.append([])
            bins[number].append(document)
            if left > size:
                insort(room, (left - size, number))
        return bins

    @cached_property
    def order(self) -> Permutation:
        """The order of the rows."""
        return Permutation(self.count, self.seed)

    @property
    def count(self) -> int:
        """Rows in an epoch."""
        return len(self.bins)

    def row(self, index: int) -> Row:
        """The row at this place of the order."""
        starts = self.shards.starts_D1
        pieces = [cut(self.shards, int(starts[d]), int(starts[d + 1])) for d in self.bins[int(self.order(index))]]
        batch = join(pieces, 0)
        return Row(batch.tokens_T, batch.targets_T, batch.lengths)

    def tokens_between(self, start: int, stop: int) -> int:
        """Tokens in the rows [start, stop)."""
        sizes_D = np.diff(self.shards.starts_D1)
        rows = self.order(np.arange(start, stop)).tolist()
        return int(sum(sizes_D[self.bins[row]].sum() for row in rows))
