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

from whimbrel.ops.cpu.library import address, by_rows, call, fits, structure
from whimbrel.ops.cpu.matmul import multiply
from whimbrel.ops.memory import fresh
from whimbrel.ops.torch import head

_Entropy = structure("Entropy", "logits targets up loss", "rows columns learn")


Wanted = tuple[bool, bool]
"""Are the gradients of hidden and weight asked for?"""


def _pass(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, up_T: Tensor | None, chunk: int, wanted: Wanted
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of each row, and those gradients of hidden and weight that are wanted, rows weighing `up` (None: 1)."""
    (tokens, width), vocabulary = hidden_TD.shape, weight_VD.shape[0]
    loss_T, rows = torch.empty(tokens), min(chunk, tokens)
    dhidden_TD = fresh(tokens, width) if wanted[0] else None
    dweight_VD = fresh(vocabulary, width) if wanted[1] else None
    logits_RV = fresh(rows, vocabulary)
    for at in range(0, tokens, rows):
        part = slice(at, at + rows)
        hidden, targets, loss = hidden_TD[part], targets_T[part], loss_T[part]
        logits = multiply(hidden, weight_VD.t(), logits_RV[: len(loss)])
        pointers = (address(logits), address(targets), None if up_T is None else address(up_T[part]), address(loss))
        call("cross_entropy", _Entropy(*pointers, len(loss), vocabulary, any(wanted)))
        if dhidden_TD is not None:
            multiply(logits, weight_VD, dhidden_TD[part])
        if dweight_VD is not None:
            multiply(logits.t(), hidden, dweight_VD, add=at > 0)
    return loss_T, dhidden_TD, dweight_VD


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int, wanted: Wanted
    ) -> Tensor:
        hidden_TD, weight_VD, targets_T = by_rows(hidden_TD), by_rows(weight_VD), targets_T.contiguous()
        loss_T, *gradients = _pass(hidden_TD, weight_VD, targets_T, None, chunk, wanted)
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, *gradients)
        ctx.chunk, ctx.wanted = chunk, wanted
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, targets_T, dhidden_TD, dweight_VD = ctx.saved_tensors
        (up_T,) = gradients
        least, most = up_T.aminmax()
        if least == most:
            found = (dhidden_TD, dweight_VD)
            return *(None if gradient is None else gradient * most for gradient in found), None, None, None
        _, *found_anew = _pass(hidden_TD, weight_VD, targets_T, up_T.contiguous(), ctx.chunk, ctx.wanted)
        return *found_anew, None, None, None


def cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int = head.CHUNK) -> Tensor:
    """As `ops.torch.cross_entropy`, in float32 on a CPU."""
    if not hidden_TD.shape[0] or hidden_TD.dim() != 2 or not fits(hidden_TD, weight_VD):
        return head.cross_entropy(hidden_TD, weight_VD, targets_T, chunk)
    learn = torch.is_grad_enabled()
    wanted = (learn and hidden_TD.requires_grad, learn and weight_VD.requires_grad)
    return _CrossEntropy.apply(hidden_TD, weight_VD, targets_T, chunk, wanted)
