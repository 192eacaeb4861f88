"""Context parallel: the tokens of a micro-batch lie in contiguous pieces on several ranks, and what a layer needs from
the tokens before its piece is handed over.

The convolution needs the last W-1 inputs (a halo). The scan needs the state at the end of the piece before. Each rank
computes what its last document adds to a state, S = sum_t exp(sum_{k>t} a dt_k) dt_t x_t B_t^T, and by how much it
lets an older state fade, f = exp(sum_t a dt_t): ranks gather these and carry h <- S + f h over the pieces before
theirs, which costs megabytes a layer whatever the length (arXiv 2405.21060, section 8.2, has the same idea). Attention
gathers keys and values. All of it is exact and differentiable.

T tokens of this rank, S its sequences (document pieces), C ranks, H heads, P head width, G groups, N state size, K
key/value heads, E their width, I channels of the convolution, W its width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, distributed

from whimbrel.errors import UserError
from whimbrel.model.layout import Exchange, Layout
from whimbrel.ops.segments import Segments
from whimbrel.parallel.collectives import gather
from whimbrel.parallel.mesh import Share


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of a micro-batch that one rank computes. The targets were shifted before the cut."""

    tokens_T: NDArray[np.int64]
    targets_T: NDArray[np.int64]
    lengths: tuple[int, ...]
    past: int
    """Tokens of the first document that lie on ranks before."""
    exchange: Exchange

    def layout(self, device: torch.device, rows: Tensor | None = None) -> Layout:
        """The layout of these tokens, with what knows of the others."""
        past = (self.past, *(0 for _ in self.lengths[1:]))
        return Layout.of(self.lengths, past, rows=rows, device=device, exchange=self.exchange)


def piece_of(batch: Any, share: Share) -> Piece:
    """This rank's tokens of a micro-batch with `tokens_T`, `targets_T` and `lengths`: an equal part, in order."""
    ranks, rank = share.axes.context, share.place["context"]
    if not all(hasattr(batch, name) for name in ("tokens_T", "targets_T", "lengths")):
        raise UserError(
            f"train.parallel.context is {ranks}, but this objective does not learn from rows of packed tokens; set it "
            "to 1"
        )
    tokens = len(batch.tokens_T)
    if tokens < ranks:
        raise UserError(f"train.parallel.context is {ranks}, but a micro-batch has {tokens} tokens; set it to 1")
    bounds = [tokens * r // ranks for r in range(ranks + 1)]
    cut = _Cuts(tuple(bounds), (0, *accumulate(batch.lengths)))
    begin, end = bounds[rank], bounds[rank + 1]
    inside = [begin, *(o for o in cut.offsets if begin < o < end), end]
    lengths = tuple(b - a for a, b in pairwise(inside))
    exchange = Handover(share.group("context"), rank, cut)
    return Piece(batch.tokens_T[begin:end], batch.targets_T[begin:end], lengths, cut.past(rank), exchange)


@dataclass(frozen=True)
class _Cuts:
    """Where ranks and documents begin in a micro-batch: known to every rank, so that nobody has to ask."""

    bounds: tuple[int, ...]
    """[C+1] first token of each rank, and the number of tokens."""
    offsets: tuple[int, ...]
    """[documents + 1] first token of each document, and the number of tokens."""

    def past(self, rank: int) -> int:
        """Tokens before this rank of the document that it begins in the middle of; 0 if it begins with a new one."""
        return self.bounds[rank] - max(o for o in self.offsets if o <= self.bounds[rank])

    def last(self, rank: int) -> int:
        """Tokens here of the last document that begins or lies here."""
        begin, end = self.bounds[rank], self.bounds[rank + 1]
        return end - max(begin, *(o for o in self.offsets if o < end))

    def through(self, rank: int) -> bool:
        """Does one document cover all of this rank, and begin before it?"""
        return self.past(rank) > 0 and self.last(rank) == self.bounds[rank + 1] - self.bounds[rank]


class Handover(Exchange):
    """`Layout.exchange` between ranks that hold consecutive pieces.

    Every rank calls every collective, in the same order forward and back, and what it gathers stays in its graph even
    where none of it is used: otherwise the backward passes would wait for each other for ever.
    """

    def __init__(self, group: distributed.ProcessGroup, rank: int, cuts: _Cuts) -> None:
        self.group, self.rank, self.cuts = group, rank, cuts
        self.needed = any(cuts.past(r) for r in range(len(cuts.bounds) - 1))
        """Is any document cut at all?"""

    def halo(self, x_TI: Tensor, width: int, sequences: int) -> Tensor | None:
        """The `width` inputs before each sequence, [S, I, width]: zeros but for a document that began before."""
        if not self.needed or not width:
            return None
        tail = F.pad(x_TI[-width:], (0, 0, max(0, width - len(x_TI)), 0))
        tails = gather(tail, self.group).flatten(0, 1)  # [C * width, I]
        start, past = self.cuts.bounds[self.rank], self.cuts.past(self.rank)
        rows, real = [], []
        for place in range(start - width, start):
            owner = next((r for r in range(self.rank) if self.cuts.bounds[r] <= place < self.cuts.bounds[r + 1]), 0)
            real.append(place >= start - past)
            rows.append(owner * width + place - self.cuts.bounds[owner + 1] + width if real[-1] else 0)
        index, mask = (torch.tensor(v, device=x_TI.device) for v in (rows, real))
        first = tails[index].masked_fill(~mask[:, None], 0).t()
        return torch.cat([first[None], first.new_zeros(sequences - 1, *first.shape)])

    def state(self, x_THP: Tensor, dt_TH: Tensor, a_H: Tensor, b_TGN: Tensor, sequences: int) -> Tensor | None:
        """The state that each sequence begins with, [S, H, P, N]: zeros but for a document that began before."""
        if not self.needed:
            return None
        dtype = torch.promote_types(x_THP.dtype, torch.float32)
        last = self.cuts.last(self.rank)
        x, dt, b = (v[len(v) - last :].to(dtype) for v in (x_THP, dt_TH, b_TGN))
        fall = dt * a_H.to(dtype)
        after = F.pad(fall[1:].flip(0).cumsum(0).flip(0), (0, 0, 0, 1))  # what later tokens take away: small where it
        u = (dt * after.exp())[..., None] * x  # matters, at the end
        groups, (heads, width, size) = b.shape[1], (*x.shape[1:], b.shape[2])
        u_GIT = u.reshape(last, groups, -1).permute(1, 2, 0)
        added = torch.bmm(u_GIT, b.transpose(0, 1)).view(heads, width * size)
        both = gather(torch.cat([added, fall.sum(0)[:, None]], 1), self.group)  # [C, H, PN + 1]
        carried = both[:0, :, :-1].sum(0)
        for r in range(self.rank):
            before = carried * both[r, :, -1:].exp() if self.cuts.through(r) else 0
            carried = both[r, :, :-1] + before
        if not self.cuts.past(self.rank):
            carried = carried[:0].sum(0, keepdim=True).expand(heads, -1)
        first = carried.view(1, heads, width, size)
        return torch.cat([first, first.new_zeros(sequences - 1, heads, width, size)])

    def keys(self, k_TKE: Tensor, v_TKE: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Segments]:
        """Keys, values and their cut, with those of the first sequence's tokens on ranks before."""
        if not self.needed:
            return k_TKE, v_TKE, segments
        most = max(b - a for a, b in pairwise(self.cuts.bounds))
        both = torch.stack([k_TKE, v_TKE], 1)
        both = gather(F.pad(both, (0, 0) * 3 + (0, most - len(both))), self.group)  # [C, most, 2, K, E]
        start, past = self.cuts.bounds[self.rank], self.cuts.past(self.rank)
        history = [both[0, :0]]
        for r in range(self.rank):
            begin = max(self.cuts.bounds[r], start - past)
            if begin < self.cuts.bounds[r + 1]:
                history.append(both[r, begin - self.cuts.bounds[r] : self.cuts.bounds[r + 1] - self.cuts.bounds[r]])
        before = torch.cat(history)
        whole = Segments.of([past + segments.lengths[0], *segments.lengths[1:]], segments.device)
        return torch.cat([before[:, 0], k_TKE]), torch.cat([before[:, 1], v_TKE]), whole
