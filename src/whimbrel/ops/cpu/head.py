"""Losses over the vocabulary (native/src/head.cpp) of which no logits are kept: a chunk of rows has them for a moment.

What reaches a loss of training is one number for all rows (the loss is their sum, times something), so the gradient of
cross-entropy and divergence for 1 is computed while the logits are there, and multiplied later: three products instead
of four, four instead of six. Where rows do weigh differently, the logits are computed again; those of `log_prob`, which
weigh by advantages, always are. T rows, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from whimbrel.ops.cpu.library import address, by_rows, call, fits, structure
from whimbrel.ops.cpu.matmul import multiply
from whimbrel.ops.memory import fresh
from whimbrel.ops.torch import head

_Entropy = structure("Entropy", "logits targets up loss", "rows columns learn")
_Divergence = structure("Divergence", "logits teacher up loss", "rows columns learn")


Wanted = tuple[bool, bool]
"""Are the gradients of hidden and weight asked for?"""
Judge = Callable[[slice, Tensor, Tensor | None, Tensor, bool], None]
"""Of some rows: their logits, what weighs them (None: 1), their losses to be written, and whether to write the gradient
in the place of the logits.
"""


def _labels(targets_T: Tensor) -> Judge:
    """Cross-entropy with these targets."""
    targets_T = targets_T.contiguous()

    def judge(rows: slice, logits_RV: Tensor, up_R: Tensor | None, loss_R: Tensor, learn: bool) -> None:
        pointers = [address(v) for v in (logits_RV, targets_T[rows], up_R, loss_R)]
        call("cross_entropy", _Entropy(*pointers, *logits_RV.shape, learn))

    return judge


def _wisdom(teacher_TD: Tensor, teacher_VD: Tensor) -> Judge:
    """Divergence from this teacher, whose logits are there for a chunk at a time too."""
    teacher_TD, teacher_VD = by_rows(teacher_TD), by_rows(teacher_VD)
    room: list[Tensor] = []

    def judge(rows: slice, logits_RV: Tensor, up_R: Tensor | None, loss_R: Tensor, learn: bool) -> None:
        if not room or len(room[0]) < len(loss_R):
            room[:] = [fresh(*logits_RV.shape)]
        wise_RV = multiply(teacher_TD[rows], teacher_VD.t(), room[0][: len(loss_R)])
        pointers = [address(v) for v in (logits_RV, wise_RV, up_R, loss_R)]
        call("divergence", _Divergence(*pointers, *logits_RV.shape, learn))
        if rows.stop >= len(teacher_TD):
            room.clear()

    return judge


def _pass(
    hidden_TD: Tensor, weight_VD: Tensor, judge: Judge, up_T: Tensor | None, chunk: int, wanted: Wanted
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of each row, and those gradients of hidden and weight that are wanted, rows weighing `up` (None: 1)."""
    (tokens, width), vocabulary = hidden_TD.shape, weight_VD.shape[0]
    loss_T, rows = torch.empty(tokens), min(chunk, tokens)
    dhidden_TD = fresh(tokens, width) if wanted[0] else None
    dweight_VD = fresh(vocabulary, width) if wanted[1] else None
    logits_RV = fresh(rows, vocabulary)
    for at in range(0, tokens, rows):
        part = slice(at, at + rows)
        hidden, loss = hidden_TD[part], loss_T[part]
        logits = multiply(hidden, weight_VD.t(), logits_RV[: len(loss)])
        judge(part, logits, None if up_T is None else up_T[part], loss, any(wanted))
        if dhidden_TD is not None:
            multiply(logits, weight_VD, dhidden_TD[part])
        if dweight_VD is not None:
            multiply(logits.t(), hidden, dweight_VD, add=at > 0)
    return loss_T, dhidden_TD, dweight_VD


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, judge: Judge, chunk: int, wanted: Wanted, later: bool
    ) -> Tensor:
        hidden_TD, weight_VD = by_rows(hidden_TD), by_rows(weight_VD)
        now = (False, False) if later else wanted
        loss_T, *gradients = _pass(hidden_TD, weight_VD, judge, None, chunk, now)
        ctx.save_for_backward(hidden_TD, weight_VD, *gradients)
        ctx.judge, ctx.chunk, ctx.wanted, ctx.later = judge, chunk, wanted, later
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, *found = ctx.saved_tensors
        (up_T,) = gradients
        least, most = up_T.aminmax()
        if least == most and not ctx.later:
            found = [None if gradient is None else gradient * most for gradient in found]
        else:
            _, *found = _pass(hidden_TD, weight_VD, ctx.judge, up_T.contiguous(), ctx.chunk, ctx.wanted)
        return *found, None, None, None, None


def _loss(hidden_TD: Tensor, weight_VD: Tensor, judge: Judge, chunk: int, later: bool = False) -> Tensor:
    learn = torch.is_grad_enabled()
    wanted = (learn and hidden_TD.requires_grad, learn and weight_VD.requires_grad)
    return _Loss.apply(hidden_TD, weight_VD, judge, chunk, wanted, later)


def _ours(hidden_TD: Tensor, *others: Tensor) -> bool:
    return hidden_TD.dim() == 2 and hidden_TD.shape[0] > 0 and fits(hidden_TD, *others)


def cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int = head.CHUNK) -> Tensor:
    """As `ops.torch.cross_entropy`, in float32 on a CPU."""
    if not _ours(hidden_TD, weight_VD):
        return head.cross_entropy(hidden_TD, weight_VD, targets_T, chunk)
    return _loss(hidden_TD, weight_VD, _labels(targets_T), chunk)


def log_prob(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int = head.CHUNK) -> Tensor:
    """As `ops.torch.log_prob`, in float32 on a CPU."""
    if not _ours(hidden_TD, weight_VD):
        return head.log_prob(hidden_TD, weight_VD, targets_T, chunk)
    return -_loss(hidden_TD, weight_VD, _labels(targets_T), chunk, later=True)


def kl(hidden_TD: Tensor, weight_VD: Tensor, teacher_TD: Tensor, teacher_VD: Tensor, chunk: int = head.CHUNK) -> Tensor:
    """As `ops.torch.kl`, in float32 on a CPU."""
    if not _ours(hidden_TD, weight_VD, teacher_TD, teacher_VD):
        return head.kl(hidden_TD, weight_VD, teacher_TD, teacher_VD, chunk)
    return _loss(hidden_TD, weight_VD, _wisdom(teacher_TD.detach(), teacher_VD.detach()), chunk)
