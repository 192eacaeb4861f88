"""Decoding steps on a GPU as recorded graphs: the host sends nine short rows and starts one graph a token.

A step of 56 layers is hundreds of launches, and each costs the host microseconds. A graph is recorded once for each
bucket of sequences and of context (powers of two) and each kind of draw, and reads everything that changes from tensors
of its own: ids, slots, lengths, block tables, and what the draws need. Rows that fill up a bucket write to a slot and a
block that belong to nobody. On a CPU the same step runs unrecorded, which is how it is tested. S sequences, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from whimbrel.engine.pool import Pool
from whimbrel.engine.sampler import Draw, Kinds, draw, kinds, numbers
from whimbrel.engine.sequence import Sequence
from whimbrel.model.language import LanguageModel
from whimbrel.model.layout import Layout
from whimbrel.ops import Segments

T = TypeVar("T")

LEAST_BLOCKS = 64
"""Blocks of the smallest bucket of contexts: 1,024 tokens."""


def bucket(number: int, least: int, most: int) -> int:
    """The next power of two from `least` on, at most `most`."""
    return min(most, max(least, 1 << max(0, number - 1).bit_length()))


def record(work: Callable[[], T], memory: Any = None) -> tuple[Any, T]:
    """A CUDA graph of some work, after two runs in which kernels are compiled and constants made, and its result.

    memory: a pool that several graphs share.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory):
        result = work()
    return graph, result


class _Step:
    """One bucket: its tensors, and on a GPU the graph that reads them."""

    def __init__(
        self, model: LanguageModel, pool: Pool, logits_SV: Tensor, batch: int, width: int, kind: Kinds, memory: Any
    ) -> None:
        self.kind, self.logits_SV = kind, logits_SV[:batch]
        self.model, self.pool, device = model, pool, pool.table.device
        self.sent = torch.zeros(9, batch, dtype=torch.int64, pin_memory=device.type == "cuda")
        """Ids, slots, lengths so far, and the six numbers (float64) of each draw, on the host."""
        self.sent[1], self.sent[2] = pool.slots, 0
        self.here = self.sent.to(device)
        self.table = torch.full((batch, width), pool.blocks, dtype=torch.int64, device=device)
        self.whole = self.table.new_empty(batch, pool.table.shape[1])
        self.layout = Layout(
            Segments.of([1] * batch, device), (1,) * batch, self.here[2], batch, self.here[1], self.table
        )
        self.graph: Any = None
        if device.type == "cuda":
            self.copied = torch.cuda.Event()
            self.graph, self.ids_S = record(self._compute, memory)  # only rows of nobody are written

    def _compute(self) -> Tensor:
        self.layout._derived.clear()  # what is derived from lengths and tables belongs to the graph
        torch.index_select(self.pool.table, 0, self.here[1], out=self.whole)
        self.table.copy_(self.whole[:, : self.table.shape[1]])
        logits_SV = self.model.head(self.model(self.here[0], self.layout, self.pool.state))
        self.logits_SV.copy_(logits_SV)  # one place for all buckets, or each graph would keep its own
        seen_SV, seen = None, self.pool.seen
        if self.kind.penalised and seen is not None:
            seen.view(-1).index_fill_(0, self.here[1] * seen.shape[1] + self.here[0], True)
            seen_SV = seen.index_select(0, self.here[1])
        settings_6S = None if self.kind.plain else self.here[3:].view(torch.float64)
        return draw(logits_SV, settings_6S, self.kind, seen_SV)

    def run(self, tokens: Rows[int], slots: Rows[int], past: Rows[int], draws: Rows[Draw]) -> tuple[Tensor, Tensor]:
        """Logits [S, V] and the ids [S] drawn for these sequences, valid until the next step."""
        count = len(tokens)
        if self.graph is not None:
            self.copied.synchronize()  # of the step before: long over, unless nobody waited for its ids
        self.sent[1], self.sent[2] = self.pool.slots, 0
        self.sent[:3, :count] = torch.tensor([list(tokens), list(slots), list(past)])
        if not self.kind.plain:
            self.sent[3:, :count] = numbers(draws).view(torch.int64)
        self.here.copy_(self.sent, non_blocking=True)
        if self.graph is None:
            self.layout = replace(self.layout, past=tuple(self.sent[2].tolist()), _derived={})
            self.ids_S = self._compute()
        else:
            self.copied.record()
            self.graph.replay()
        return self.logits_SV[:count], self.ids_S[:count]


class DecodeGraphs:
    """All buckets of an engine's pool (which must have `spare`)."""

    def __init__(self, model: LanguageModel, pool: Pool) -> None:
        self.model, self.pool = model, pool
        dtype = torch.promote_types(model.dtype, torch.float32)
        self._logits_SV = torch.empty(pool.slots, model.config.vocab_size, dtype=dtype, device=pool.table.device)
        self._steps: dict[tuple[int, int, Kinds], _Step] = {}
        self._memory = torch.cuda.graph_pool_handle() if pool.table.device.type == "cuda" else None
        self._addresses: tuple[int, list[int]] = (-1, [])

    def step(self, sequences: Rows[Sequence], draws: Rows[Draw]) -> tuple[Tensor, Tensor]:
        """Logits [S, V] and ids [S] after the next token of each sequence that the pool does not have yet; -1 is the
        host's to draw. Draws that are `wide` come first, and their tokens so far are marked in the pool.
        """
        self._forget_if_moved()
        blocks = max((len(sequence.blocks) for sequence in sequences), default=0)
        batch, kind = bucket(len(sequences), 1, self.pool.slots), kinds(draws)
        ordered = bucket(kind.ordered, 1, batch) if kind.ordered else 0
        key = (
            batch,
            bucket(blocks, LEAST_BLOCKS, self.pool.table.shape[1]),
            kind._replace(ordered=ordered, greedy=True, floored=True),
        )
        if key not in self._steps:
            self._steps[key] = _Step(self.model, self.pool, self._logits_SV, *key, self._memory)
        slots = [sequence.slot for sequence in sequences if sequence.slot is not None]
        last, past = [s.tokens[s.cached] for s in sequences], [s.cached for s in sequences]
        return self._steps[key].run(last, slots, past, draws)

    def _forget_if_moved(self) -> None:
        """Graphs hold the addresses of weights: where weights lie elsewhere now, they are recorded anew."""
        version, addresses = self._addresses
        if version == self.model.weights_version:
            return
        now = [tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())]
        if now != addresses:
            self._steps.clear()
        self._addresses = (self.model.weights_version, now)
