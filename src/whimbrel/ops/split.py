"""Losses over a vocabulary whose matrix is cut by rows over ranks. The ranks come as a value with two sums: nothing
here knows how they talk.

Every rank has the same hidden states and a part of the logits; what is exchanged is two numbers a row, and the gradient
of the hidden states once. T rows, D model width, V vocabulary, v rows of the matrix here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from whimbrel.ops.torch.head import CHUNK, IGNORE


class Ranks(Protocol):
    """How ranks that share a vocabulary talk; no gradient flows through these."""

    def add(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""

    def largest(self, x: Tensor) -> Tensor:
        """Maximum over the ranks, in place."""

    def gather(self, x: Tensor) -> Tensor:
        """[n, v] of each rank side by side: [n, V]."""


@dataclass(frozen=True, eq=False)
class SplitVocabulary:
    """Rows [first, first + v) of a vocabulary matrix; it stands where `ops` take the whole one."""

    weight_vD: Tensor
    first: int
    ranks: Ranks

    def rows_of(self, whole_VD: Tensor | SplitVocabulary) -> Tensor:
        """The rows here of another matrix over the same vocabulary."""
        if isinstance(whole_VD, SplitVocabulary):
            return whole_VD.weight_vD
        return whole_VD[self.first : self.first + self.weight_vD.shape[0]]


def _logits(hidden: Tensor, weight_vD: Tensor) -> Tensor:
    return (hidden @ weight_vD.t()).to(torch.promote_types(hidden.dtype, torch.float32))


def _logsumexp(logits: Tensor, ranks: Ranks) -> Tensor:
    """log of the sum of exp over the whole vocabulary, a number a row."""
    top = ranks.largest(logits.amax(-1))
    return top + ranks.add((logits - top[:, None]).exp_().sum(-1)).log_()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_vD: Tensor, targets_T: Tensor, first: int, ranks: Ranks, chunk: int
    ) -> Tensor:
        targets_T = targets_T - first
        inside_T = (targets_T >= 0) & (targets_T < weight_vD.shape[0])
        place_T = targets_T.clamp(0, weight_vD.shape[0] - 1)
        ignored_T = targets_T == IGNORE - first
        lse, chosen = [], []
        for hidden, place, inside in zip(
            hidden_TD.split(chunk), place_T.split(chunk), inside_T.split(chunk), strict=True
        ):
            logits = _logits(hidden, weight_vD)
            chosen.append(logits.gather(1, place[:, None])[:, 0].masked_fill_(~inside, 0))
            lse.append(_logsumexp(logits, ranks))
        lse_T = torch.cat(lse)
        ctx.save_for_backward(hidden_TD, weight_vD, place_T, inside_T, ignored_T, lse_T)
        ctx.ranks, ctx.chunk = ranks, chunk
        return (lse_T - ranks.add(torch.cat(chosen))).masked_fill_(ignored_T, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        hidden_TD, weight_vD, place_T, inside_T, ignored_T, lse_T = ctx.saved_tensors
        up_T = gradients[0].masked_fill(ignored_T, 0)
        dhidden_TD = torch.empty_like(hidden_TD)
        dweight_vD = torch.zeros_like(weight_vD, dtype=lse_T.dtype)
        for at in range(0, hidden_TD.shape[0], ctx.chunk):
            rows = slice(at, at + ctx.chunk)
            dlogits = _logits(hidden_TD[rows], weight_vD).sub_(lse_T[rows, None]).exp_().mul_(up_T[rows, None])
            dlogits.scatter_add_(1, place_T[rows, None], -(up_T * inside_T)[rows, None])
            dlogits = dlogits.to(hidden_TD.dtype)
            dhidden_TD[rows] = dlogits @ weight_vD
            dweight_vD += dlogits.t() @ hidden_TD[rows]
        return ctx.ranks.add(dhidden_TD), dweight_vD.to(weight_vD.dtype), None, None, None, None


def cross_entropy(hidden_TD: Tensor, split: SplitVocabulary, targets_T: Tensor, chunk: int = CHUNK) -> Tensor:
    """-log p(target) of each row [T]; 0 where the target is -100. The same on every rank."""
    if not len(hidden_TD):
        return hidden_TD.sum(-1)
    return _CrossEntropy.apply(hidden_TD, split.weight_vD, targets_T, split.first, split.ranks, chunk)


def log_prob(hidden_TD: Tensor, split: SplitVocabulary, targets_T: Tensor, chunk: int = CHUNK) -> Tensor:
    """log p(target) of each row [T]; 0 where the target is -100."""
    return -cross_entropy(hidden_TD, split, targets_T, chunk)


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_vD: Tensor, teacher_TD: Tensor, teacher_vD: Tensor, ranks: Ranks, chunk: int
    ) -> Tensor:
        parts, lse = [], []
        for hidden, teacher in zip(hidden_TD.split(chunk), teacher_TD.split(chunk), strict=True):
            student, wise = _logits(hidden, weight_vD), _logits(teacher, teacher_vD)
            lse.append(torch.stack([_logsumexp(student, ranks), _logsumexp(wise, ranks)]))
            student_log, wise_log = student - lse[-1][0, :, None], wise - lse[-1][1, :, None]
            parts.append((wise_log.exp() * (wise_log - student_log)).sum(-1))
        ctx.save_for_backward(hidden_TD, weight_vD, teacher_TD, teacher_vD, torch.cat(lse, 1))
        ctx.ranks, ctx.chunk = ranks, chunk
        return ranks.add(torch.cat(parts))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        hidden_TD, weight_vD, teacher_TD, teacher_vD, lse_2T = ctx.saved_tensors
        up_T = gradients[0]
        dhidden_TD = torch.empty_like(hidden_TD)
        dweight_vD = torch.zeros_like(weight_vD, dtype=up_T.dtype)
        for at in range(0, hidden_TD.shape[0], ctx.chunk):
            rows = slice(at, at + ctx.chunk)
            own = _logits(hidden_TD[rows], weight_vD).sub_(lse_2T[0, rows, None]).exp_()
            wise = _logits(teacher_TD[rows], teacher_vD).sub_(lse_2T[1, rows, None]).exp_()
            dlogits = own.sub_(wise).mul_(up_T[rows, None]).to(hidden_TD.dtype)
            dhidden_TD[rows] = dlogits @ weight_vD
            dweight_vD += dlogits.t() @ hidden_TD[rows]
        return ctx.ranks.add(dhidden_TD), dweight_vD.to(weight_vD.dtype), None, None, None, None


def kl(
    hidden_TD: Tensor,
    split: SplitVocabulary,
    teacher_TD: Tensor,
    teacher_VD: Tensor | SplitVocabulary,
    chunk: int = CHUNK,
) -> Tensor:
    """Forward KL(teacher || student) of each row [T]; no gradient flows into the teacher, which may be whole here."""
    if not len(hidden_TD):
        return hidden_TD.sum(-1)
    teacher_vD = split.rows_of(teacher_VD).detach()
    return _KL.apply(hidden_TD, split.weight_vD, teacher_TD.detach(), teacher_vD, split.ranks, chunk)


def linear(hidden_TD: Tensor, split: SplitVocabulary, bias: None = None) -> Tensor:
    """Logits [T, V] of the whole vocabulary, on every rank; for looking, not for learning: no gradient."""
    with torch.no_grad():
        return split.ranks.gather(hidden_TD @ split.weight_vD.t())
