"""How a flat row of tokens is cut into sequences. There is no padding and no mask anywhere: this is all a layer needs.

T packed tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whimbrel.ops.segments import Segments


@dataclass(frozen=True, eq=False)
class Layout:
    """S sequences laid end to end in T tokens, in training, in prefill and in decoding alike.

    In training each document is a sequence of its own, so documents never see each other. With a state, `past` says how many
    tokens of a sequence the state already holds, `slots` where its recurrent state lies and `block_table` where its keys and
    values lie. The first `decodes` sequences bring one token each and continue a state: they take the single-step path.
    """

    segments: Segments
    """Lengths, starts and the sequence of each token."""
    past: tuple[int, ...]
    """Tokens of each sequence that came before this call; 0 where a document starts."""
    positions_T: Tensor
    """Position of each token in its document."""
    decodes: int = 0
    slots: Tensor | None = None
    """[S] slot of the recurrent state of each sequence."""
    block_table: Tensor | None = None
    """[S, blocks] blocks of keys and values of each sequence, in order."""
    rows: Tensor | None = None
    """Rows whose hidden state is wanted; None: all."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence in this call."""
        return self.segments.lengths

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        past: Sequence[int] | None = None,
        *,
        slots: Tensor | None = None,
        block_table: Tensor | None = None,
        rows: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Layout:
        """Build a layout from whole numbers. Sequences of one token with a past must come first to take the fast path."""
        segments = Segments.of(lengths, device=device)
        past = tuple(past) if past is not None else (0,) * len(segments.lengths)
        assert len(past) == len(segments.lengths), "one past for each sequence"
        offset_S = torch.tensor(past, dtype=torch.int64, device=device) - segments.starts[:-1]
        positions_T = torch.arange(segments.tokens, device=device) + offset_S[segments.sequence_T]
        decodes = 0
        if slots is not None:
            while decodes < len(past) and segments.lengths[decodes] == 1 and past[decodes] > 0:
                decodes += 1
        return cls(segments, past, positions_T, decodes, slots, block_table, rows)

    def split(self) -> tuple[Segments, Segments]:
        """The decoding sequences and the others, as two cuts of the two parts of the row."""
        return self.segments.first(self.decodes), self.segments.rest(self.decodes)
