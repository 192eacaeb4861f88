"""Cross-entropy over the vocabulary whose gradient is computed with the loss (native/src/head.cpp): three products
instead of four, and no logits are kept.

What reaches a loss in training is one number for all rows (the loss is their sum, times something), so the gradient for
1 is computed while the logits are there, and multiplied later. Where rows do weigh differently, the logits are computed
again. T rows, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from whimbrel.ops.cpu.library import address, call, fits, structure
from whimbrel.ops.cpu.matmul import multiply, rows_of
from whimbrel.ops.memory import fresh
from whimbrel.ops.torch import head

_Entropy = structure("Entropy", "logits targets up loss", "rows columns learn")


def _pass(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, up_T: Tensor | None, chunk: int, learn: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row; with `learn` the gradients of hidden and weight, rows weighing `up` (None: 1)."""
    (tokens, width), vocabulary = hidden_TD.shape, weight_VD.shape[0]
    loss_T, rows = torch.empty(tokens), min(chunk, tokens)
    dhidden_TD, dweight_VD = (fresh(tokens, width), fresh(vocabulary, width)) if learn else (loss_T[:0], loss_T[:0])
    logits_RV = fresh(rows, vocabulary)
    for at in range(0, tokens, rows):
        part = slice(at, at + rows)
        hidden, targets, loss = hidden_TD[part], targets_T[part], loss_T[part]
        logits = multiply(hidden, weight_VD.t(), logits_RV[: len(loss)])
        pointers = (address(logits), address(targets), None if up_T is None else address(up_T[part]), address(loss))
        call("cross_entropy", _Entropy(*pointers, len(loss), vocabulary, learn))
        if learn:
            multiply(logits, weight_VD, dhidden_TD[part])
            multiply(logits.t(), hidden, dweight_VD, add=at > 0)
    return loss_T, dhidden_TD, dweight_VD


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int, learn: bool) -> Tensor:
        hidden_TD, weight_VD, targets_T = rows_of(hidden_TD), rows_of(weight_VD), targets_T.contiguous()
        loss_T, *gradients = _pass(hidden_TD, weight_VD, targets_T, None, chunk, learn)
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, *gradients)
        ctx.chunk = chunk
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, targets_T, dhidden_TD, dweight_VD = ctx.saved_tensors
        (up_T,) = gradients
        least, most = up_T.aminmax()
        if least == most:
            return dhidden_TD * most, dweight_VD * most, None, None, None
        _, dhidden_TD, dweight_VD = _pass(hidden_TD, weight_VD, targets_T, up_T.contiguous(), ctx.chunk, True)
        return dhidden_TD, dweight_VD, None, None, None


def cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int = head.CHUNK) -> Tensor:
    """As `ops.torch.cross_entropy`, in float32 on a CPU."""
    if not hidden_TD.shape[0] or hidden_TD.dim() != 2 or not fits(hidden_TD, weight_VD):
        return head.cross_entropy(hidden_TD, weight_VD, targets_T, chunk)
    learn = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return _CrossEntropy.apply(hidden_TD, weight_VD, targets_T, chunk, learn)
