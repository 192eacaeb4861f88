"""How a flat row of tokens is cut into sequences. There is no padding and no mask anywhere: this is all a layer needs.

T packed tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from whimbrel.model.config import ModelConfig
from whimbrel.model.positions import rotation
from whimbrel.ops.segments import Segments, put


class Exchange:
    """What a layer in training needs from tokens that lie on other ranks. This one knows of none; `parallel/context.py`
    has one that asks.
    """

    def halo(self, x_TI: Tensor, width: int, sequences: int) -> Tensor | None:
        """[S, I, width]: the convolution's inputs before each sequence; None: zeros."""
        return None

    def state(self, x_THP: Tensor, dt_TH: Tensor, a_H: Tensor, b_TGN: Tensor, sequences: int) -> Tensor | None:
        """[S, H, P, N]: the SSM state each sequence begins with; None: zeros."""
        return None

    def keys(self, k_TKE: Tensor, v_TKE: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Segments]:
        """Keys and values of all tokens that these may see, and their cut."""
        return k_TKE, v_TKE, segments


ALONE = Exchange()


@dataclass(frozen=True, eq=False)
class Layout:
    """S sequences laid end to end in T tokens, in training, in prefill and in decoding alike.

    In training each document is a sequence of its own, so documents never see each other. With a state, `past` says
    how many tokens of a sequence the state already holds, `slots` where its recurrent state lies and `block_table`
    where its keys and values lie. The first `decodes` sequences bring one token each and continue a state: they take
    the single-step path.
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
    exchange: Exchange = ALONE
    """How layers reach tokens of these sequences that lie elsewhere; only without a state."""
    _derived: dict[str, Any] = field(default_factory=dict, repr=False)

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
        exchange: Exchange = ALONE,
    ) -> Layout:
        """Build a layout from whole numbers. Sequences of one token with a past come first, to take the fast path."""
        segments = Segments.of(lengths, device=device)
        past = tuple(past) if past is not None else (0,) * len(segments.lengths)
        assert len(past) == len(segments.lengths), "one past for each sequence"
        offset_S = put(past, device) - segments.starts[:-1]
        positions_T = torch.arange(segments.tokens, device=device) + offset_S[segments.sequence_T]
        decodes = 0
        if slots is not None:
            while decodes < len(past) and segments.lengths[decodes] == 1 and past[decodes] > 0:
                decodes += 1
        return cls(segments, past, positions_T, decodes, slots, block_table, rows, exchange)

    def rotation(self, config: ModelConfig) -> tuple[Tensor, Tensor]:
        """cos_TR and sin_TR of the rotary angles, computed once for all layers."""
        if "rotation" not in self._derived:
            self._derived["rotation"] = rotation(config, self.positions_T)
        return self._derived["rotation"]

    @property
    def only_decodes(self) -> bool:
        """Does every sequence bring one token and continue a state?"""
        return 0 < self.decodes == len(self.past)

    def wanted(self, x: Tensor) -> Tensor:
        """Of [T, ...] the rows whose hidden state is wanted."""
        return x if self.rows is None else x[self.rows]

    def others(self) -> Segments:
        """The cut of the sequences that do not decode."""
        return self._derived.setdefault("others", self.segments.rest(self.decodes))

    def fresh(self) -> Tensor:
        """[S] bool, of these sequences: does it begin here?"""
        if "fresh" not in self._derived:
            begins = [past == 0 for past in self.past[self.decodes :]]
            self._derived["fresh"] = put(begins, self.segments.device, torch.bool)
        return self._derived["fresh"]

    def rest(self) -> Layout:
        """The sequences that do not decode, as a layout of their own, with every row."""
        count = self.decodes
        slots, table = (None if v is None else v[count:] for v in (self.slots, self.block_table))
        return Layout(self.others(), self.past[count:], self.positions_T[count:], 0, slots, table)

    def key_counts(self) -> Tensor:
        """[T] int64: keys that each token sees, itself included."""
        if "key_counts" not in self._derived:
            self._derived["key_counts"] = self.positions_T + 1
        return self._derived["key_counts"]

    def places(self, block_size: int) -> Tensor:
        """[T] where each token's key and value belong in the flattened blocks."""
        if "places" not in self._derived:
            assert self.block_table is not None, "a state with attention layers needs a block table"
            block_T = self.block_table[self.segments.sequence_T, self.positions_T // block_size]
            self._derived["places"] = block_T * block_size + self.positions_T % block_size
        return self._derived["places"]

    def history(self, block_size: int) -> tuple[Segments, Tensor]:
        """All keys (past and present) of the sequences that do not decode: their cut, and their places in the
        flattened blocks.
        """
        if "history" not in self._derived:
            assert self.block_table is not None
            past, lengths = self.past[self.decodes :], self.lengths[self.decodes :]
            whole = Segments.of([p + n for p, n in zip(past, lengths, strict=True)], self.segments.device)
            block_U = self.block_table[self.decodes :][whole.sequence_T, whole.place_T // block_size]
            self._derived["history"] = whole, block_U * block_size + whole.place_T % block_size
        return self._derived["history"]
