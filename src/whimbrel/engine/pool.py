"""Who holds which memory: one slot of recurrent state for a running sequence, blocks of keys and values as it grows."""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from whimbrel.engine.sampler import Draw
from whimbrel.engine.sequence import Sequence
from whimbrel.model.config import ATTENTION, ModelConfig
from whimbrel.model.state import State
from whimbrel.ops.segments import put


class Pool:
    """Owns the `State` and hands out its parts. Nothing here fails for lack of memory: `admit` and `grow` say False
    instead.

    `slots` sequences can run at once; together they hold `kv_tokens` tokens (rounded up to blocks) of keys and values.
    A model without attention needs no blocks, and its sequences are never too long. With `spare` there is one slot and
    one block more, which belong to nobody: rows that fill up a batch may write there.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        slots: int,
        kv_tokens: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        spare: bool = False,
        state_dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.block_size = block_size
        self.attends = ATTENTION in config.pattern
        count = -(-kv_tokens // block_size) if self.attends else 0
        self.state = State.empty(
            config,
            slots=slots + spare,
            blocks=count + spare,
            block_size=block_size,
            dtype=dtype,
            ssm_dtype=state_dtype,
            kv_dtype=kv_dtype,
            device=device,
        )
        self.version: int | None = None
        """Version of the weights that computed what the pool holds."""
        self._slots = list(range(slots))  # a heap: the lowest goes first, so that an idle pool is like a new one
        self._blocks = set(range(count))
        self._table = torch.full(
            (slots + spare, max(count, 1)), count if spare else 0, dtype=torch.int64, device=device
        )
        self._device, self._vocabulary = device, config.vocab_size
        self.seen: Tensor | None = None
        """[slots, V] bool: ids in prompt and answer of sequences with a repetition penalty; made with the first."""
        self._rows: tuple[tuple[int, ...], Tensor] = ((), torch.empty(0, dtype=torch.int64, device=device))
        self.slots, self.blocks = slots, count

    @property
    def free_slots(self) -> int:
        """Slots that nobody holds."""
        return len(self._slots)

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._blocks)

    def need(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size) if self.attends else 0

    def admit(self, sequence: Sequence, spare: int = 0) -> bool:
        """Give a waiting sequence a slot and blocks for its tokens if `spare` blocks remain then; else False."""
        if not self._slots or self.need(len(sequence.tokens)) + spare > len(self._blocks):
            return False
        sequence.slot = heapq.heappop(self._slots)
        return self.grow(sequence)

    def grow(self, sequence: Sequence) -> bool:
        """Give a running sequence the blocks of all its tokens; False, and nothing taken, if they are not there."""
        assert sequence.slot is not None, "only a running sequence grows"
        missing = self.need(len(sequence.tokens)) - len(sequence.blocks)
        if missing > len(self._blocks):
            return False
        for _ in range(missing):
            block = self._next(sequence)
            self._table[sequence.slot, len(sequence.blocks)] = block
            sequence.blocks.append(block)
        return True

    def _next(self, sequence: Sequence) -> int:
        """A free block: the neighbour of the last if it can be, since neighbours are read without a copy.

        Each slot begins in a part of its own, so that where memory is ample every sequence lies in one piece.
        """
        assert sequence.slot is not None
        block = sequence.blocks[-1] + 1 if sequence.blocks else sequence.slot * self.blocks // self.slots
        if block in self._blocks:
            self._blocks.remove(block)
            return block
        return self._blocks.pop()

    def release(self, sequence: Sequence) -> None:
        """Take everything back. Nothing needs clearing: a sequence without past ignores what its slot held."""
        if sequence.slot is not None:
            heapq.heappush(self._slots, sequence.slot)
        self._blocks.update(sequence.blocks)
        sequence.slot, sequence.blocks, sequence.cached, sequence.seen = None, [], 0, 0

    def draws(self, sequences: Rows[Sequence], computed: bool = False) -> list[Draw]:
        """What the sampler needs of running sequences. What those with a repetition penalty hold is written into `seen`
        first: all of it, or what is `computed` so far, where the step marks the next token itself.
        """
        places: list[int] = []
        rows: dict[int, Tensor] = {}
        for number, sequence in enumerate(sequences):
            if sequence.sampling.repetition_penalty == 1.0:
                continue
            assert sequence.slot is not None, "only a running sequence has a record"
            if self.seen is None:
                self.seen = torch.empty(len(self._table), self._vocabulary, dtype=torch.bool, device=self._device)
            rows[number], end = self.seen[sequence.slot], sequence.cached if computed else len(sequence.tokens)
            if not sequence.seen:
                rows[number].zero_()
            places += [sequence.slot * self._vocabulary + token for token in sequence.tokens[sequence.seen : end]]
            sequence.seen = end + computed
        if self.seen is not None and places:
            self.seen.view(-1).index_fill_(0, put(places, self._device), True)
        return [sequence.draw(rows.get(number)) for number, sequence in enumerate(sequences)]

    def places(self, sequences: Rows[Sequence]) -> tuple[Tensor, Tensor]:
        """(slots_S, block_table [S, most blocks]) of running sequences; unused places of the table hold any block."""
        slots = tuple(sequence.slot for sequence in sequences if sequence.slot is not None)
        assert len(slots) == len(sequences), "only running sequences have a place"
        if slots != self._rows[0]:
            self._rows = (slots, put(slots, self._device))
        width = max((len(sequence.blocks) for sequence in sequences), default=0)
        return self._rows[1], self._table[self._rows[1], :width]

    @property
    def table(self) -> Tensor:
        """[slots, blocks] the blocks of each slot, in order; with `spare` unused places hold the block of nobody."""
        return self._table
