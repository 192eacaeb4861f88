"""Losses over the vocabulary in chunks of rows, so that the logits of a whole batch never exist at once.

The backward pass computes the logits of a chunk again instead of keeping them: one matrix product more, memory T*D
instead of T*V. T rows, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100
CHUNK = 1024


def _logits(hidden: Tensor, weight_VD: Tensor) -> Tensor:
    """float32 at least. The product itself runs in the dtype of its inputs."""
    return (hidden @ weight_VD.t()).to(torch.promote_types(hidden.dtype, torch.float32))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        lse_T = torch.empty(hidden_TD.shape[0], dtype=dtype, device=hidden_TD.device)
        loss_T = torch.empty_like(lse_T)
        for hidden, targets, lse, loss in zip(
            hidden_TD.split(chunk), targets_T.split(chunk), lse_T.split(chunk), loss_T.split(chunk), strict=True
        ):
            logits = _logits(hidden, weight_VD)
            torch.logsumexp(logits, dim=-1, out=lse)
            chosen = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
            loss.copy_((lse - chosen).masked_fill_(targets == IGNORE, 0))
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, lse_T)
        ctx.chunk = chunk
        return loss_T

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, targets_T, lse_T = ctx.saved_tensors
        up_T = gradients[0].masked_fill(targets_T == IGNORE, 0)
        dhidden_TD = torch.empty_like(hidden_TD)
        dweight_VD = torch.zeros_like(weight_VD, dtype=lse_T.dtype)
        for at in range(0, hidden_TD.shape[0], ctx.chunk):
            rows = slice(at, at + ctx.chunk)
            dlogits = _logits(hidden_TD[rows], weight_VD).sub_(lse_T[rows, None]).exp_().mul_(up_T[rows, None])
            dlogits.scatter_add_(1, targets_T[rows].clamp(min=0)[:, None], -up_T[rows, None])
            dlogits = dlogits.to(hidden_TD.dtype)
            dhidden_TD[rows] = dlogits @ weight_VD
            dweight_VD += dlogits.t() @ hidden_TD[rows]
        return dhidden_TD, dweight_VD.to(weight_VD.dtype), None, None


def cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int = CHUNK) -> Tensor:
    """-log p(target) of each row [T], float32 at least; 0 where the target is -100."""
    return _CrossEntropy.apply(hidden_TD, weight_VD, targets_T, chunk)


def log_prob(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int = CHUNK) -> Tensor:
    """log p(target) of each row [T]; 0 where the target is -100."""
    return -cross_entropy(hidden_TD, weight_VD, targets_T, chunk)


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, teacher_TD: Tensor, teacher_VD: Tensor, chunk: int
    ) -> Tensor:
        parts = []
        for hidden, teacher in zip(hidden_TD.split(chunk), teacher_TD.split(chunk), strict=True):
            student_log = _logits(hidden, weight_VD).log_softmax(-1)
            teacher_log = _logits(teacher, teacher_VD).log_softmax(-1)
            parts.append((teacher_log.exp() * (teacher_log - student_log)).sum(-1))
        ctx.save_for_backward(hidden_TD, weight_VD, teacher_TD, teacher_VD)
        ctx.chunk = chunk
        return torch.cat(parts) if parts else hidden_TD.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, teacher_TD, teacher_VD = ctx.saved_tensors
        up_T = gradients[0]
        dhidden_TD = torch.empty_like(hidden_TD)
        dweight_VD = torch.zeros_like(weight_VD, dtype=up_T.dtype)
        for at in range(0, hidden_TD.shape[0], ctx.chunk):
            rows = slice(at, at + ctx.chunk)
            dlogits = _logits(hidden_TD[rows], weight_VD).softmax(-1)
            dlogits = (
                dlogits.sub_(_logits(teacher_TD[rows], teacher_VD).softmax(-1))
                .mul_(up_T[rows, None])
                .to(hidden_TD.dtype)
            )
            dhidden_TD[rows] = dlogits @ weight_VD
            dweight_VD += dlogits.t() @ hidden_TD[rows]
        return dhidden_TD, dweight_VD.to(weight_VD.dtype), None, None, None


def kl(hidden_TD: Tensor, weight_VD: Tensor, teacher_TD: Tensor, teacher_VD: Tensor, chunk: int = CHUNK) -> Tensor:
    """Forward KL(teacher || student) of each row [T]; no gradient flows into the teacher (arXiv 2407.14679, section
    2.4).
    """
    return _KL.apply(hidden_TD, weight_VD, teacher_TD.detach(), teacher_VD.detach(), chunk)
