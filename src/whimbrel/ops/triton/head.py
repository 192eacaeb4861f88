"""Losses over the vocabulary: matrix products by torch a chunk of rows at a time, and one pass over each chunk's logits.

Logits exist for one chunk only, in the dtype of the product. The forward pass reads them once (largest, sum and the
target's in one sweep); the backward pass makes them again and replaces them in place by their gradients. T rows, D model
width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.ops import torch as vectorised
from whimbrel.ops.triton.launch import fits, settings

IGNORE = -100
CHUNK = 4096
"""Rows of a chunk: its logits in bfloat16 are 1 GiB at a vocabulary of 131,072."""


@triton.jit
def _losses(logits, targets, lse, loss, stride, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(0, V, BLOCK):
        v = at + tl.arange(0, BLOCK)
        z = tl.load(logits + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, z)
        # An empty lane is exp(-inf + inf): kept at 0 by not scaling what is still 0.
        total = tl.where(total > 0, total * tl.exp(most - higher), 0.0) + tl.where(
            z > float("-inf"), tl.exp(z - higher), 0.0
        )
        most = higher
    peak = tl.max(most, 0)
    sum_ = tl.sum(tl.where(total > 0, total * tl.exp(most - peak), 0.0), 0)
    value = peak + tl.log(sum_)
    chosen = tl.load(logits + row * stride + tl.maximum(target, 0)).to(tl.float32)
    tl.store(lse + row, value)
    tl.store(loss + row, tl.where(target == -100, 0.0, value - chosen))


@triton.jit
def _loss_gradients(logits, targets, lse, up, stride, V: tl.constexpr, BLOCK: tl.constexpr):
    """logits -> (softmax - one at the target) * up, in place."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target, norm = tl.load(targets + row), tl.load(lse + row)
    weight = tl.where(target == -100, 0.0, tl.load(up + row).to(tl.float32))
    z = tl.load(logits + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
    p = tl.exp(z - norm) - tl.where(v == target, 1.0, 0.0)
    tl.store(logits + row * stride + v, (p * weight).to(logits.dtype.element_ty), mask=v < V)


@triton.jit
def _divergences(student, teacher, stats, loss, stride, V: tl.constexpr, BLOCK: tl.constexpr):
    """KL(teacher || student) of a row, and the two log-sums [2] that its gradient needs."""
    row = tl.program_id(0).to(tl.int64)
    most_s = tl.full([BLOCK], float("-inf"), tl.float32)
    most_t = tl.full([BLOCK], float("-inf"), tl.float32)
    sum_s, sum_t = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    for at in range(0, V, BLOCK):
        v = at + tl.arange(0, BLOCK)
        real = v < V
        s = tl.load(student + row * stride + v, mask=real, other=0.0).to(tl.float32)
        t = tl.load(teacher + row * stride + v, mask=real, other=0.0).to(tl.float32)
        high_s, high_t = tl.where(real, tl.maximum(most_s, s), most_s), tl.where(real, tl.maximum(most_t, t), most_t)
        old_s = tl.where(sum_s > 0, tl.exp(most_s - high_s), 0.0)
        old_t = tl.where(sum_t > 0, tl.exp(most_t - high_t), 0.0)
        p = tl.where(real, tl.exp(t - high_t), 0.0)
        sum_s = sum_s * old_s + tl.where(real, tl.exp(s - high_s), 0.0)
        sum_t = sum_t * old_t + p
        cross = cross * old_t + p * (t - s)
        most_s, most_t = high_s, high_t
    peak_s, peak_t = tl.max(most_s, 0), tl.max(most_t, 0)
    fade_t = tl.where(sum_t > 0, tl.exp(most_t - peak_t), 0.0)
    lse_s = peak_s + tl.log(tl.sum(tl.where(sum_s > 0, sum_s * tl.exp(most_s - peak_s), 0.0), 0))
    weight = tl.sum(sum_t * fade_t, 0)
    lse_t = peak_t + tl.log(weight)
    tl.store(stats + row * 2, lse_s)
    tl.store(stats + row * 2 + 1, lse_t)
    tl.store(loss + row, tl.sum(cross * fade_t, 0) / weight - lse_t + lse_s)


@triton.jit
def _divergence_gradients(student, teacher, stats, up, stride, V: tl.constexpr, BLOCK: tl.constexpr):
    """student's logits -> (its softmax - the teacher's) * up, in place."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lse_s, lse_t, weight = tl.load(stats + row * 2), tl.load(stats + row * 2 + 1), tl.load(up + row).to(tl.float32)
    s = tl.load(student + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
    t = tl.load(teacher + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
    p = (tl.exp(s - lse_s) - tl.exp(t - lse_t)) * weight
    tl.store(student + row * stride + v, p.to(student.dtype.element_ty), mask=v < V)


def _launch() -> dict[str, int]:
    chosen = settings("head")
    return {"BLOCK": chosen["block"], "num_warps": chosen["num_warps"]}


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
        lse = torch.empty(hidden_TD.shape[0], dtype=torch.float32, device=hidden_TD.device)
        loss = torch.empty_like(lse)
        for at in range(0, hidden_TD.shape[0], chunk):
            part = slice(at, at + chunk)
            logits = hidden_TD[part] @ weight_VD.t()
            _losses[(len(logits),)](
                logits, targets_T[part], lse[part], loss[part], logits.stride(0), V=weight_VD.shape[0], **_launch()
            )
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, lse)
        ctx.chunk = chunk
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, targets_T, lse = ctx.saved_tensors
        up, vocabulary = gradients[0].contiguous(), weight_VD.shape[0]
        dhidden, dweight = torch.empty_like(hidden_TD), torch.zeros_like(weight_VD, dtype=torch.float32)
        for at in range(0, hidden_TD.shape[0], ctx.chunk):
            part = slice(at, at + ctx.chunk)
            logits, launch = hidden_TD[part] @ weight_VD.t(), _launch()
            grid = (len(logits), triton.cdiv(vocabulary, launch["BLOCK"]))
            _loss_gradients[grid](
                logits, targets_T[part], lse[part], up[part], logits.stride(0), V=vocabulary, **launch
            )
            dhidden[part] = logits @ weight_VD
            dweight += logits.t() @ hidden_TD[part]
        return dhidden, dweight.to(weight_VD.dtype), None, None


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, teacher_TD: Tensor, teacher_VD: Tensor, chunk: int
    ) -> Tensor:
        rows = hidden_TD.shape[0]
        stats = torch.empty(rows, 2, dtype=torch.float32, device=hidden_TD.device)
        loss = torch.empty(rows, dtype=torch.float32, device=hidden_TD.device)
        for at in range(0, rows, chunk):
            part = slice(at, at + chunk)
            student, teacher = hidden_TD[part] @ weight_VD.t(), teacher_TD[part] @ teacher_VD.t()
            _divergences[(len(student),)](
                student, teacher, stats[part], loss[part], student.stride(0), V=weight_VD.shape[0], **_launch()
            )
        ctx.save_for_backward(hidden_TD, weight_VD, teacher_TD, teacher_VD, stats)
        ctx.chunk = chunk
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, teacher_TD, teacher_VD, stats = ctx.saved_tensors
        up, vocabulary = gradients[0].contiguous(), weight_VD.shape[0]
        dhidden, dweight = torch.empty_like(hidden_TD), torch.zeros_like(weight_VD, dtype=torch.float32)
        for at in range(0, hidden_TD.shape[0], ctx.chunk):
            part = slice(at, at + ctx.chunk)
            student, teacher = hidden_TD[part] @ weight_VD.t(), teacher_TD[part] @ teacher_VD.t()
            launch = _launch()
            grid = (len(student), triton.cdiv(vocabulary, launch["BLOCK"]))
            _divergence_gradients[grid](
                student, teacher, stats[part], up[part], student.stride(0), V=vocabulary, **launch
            )
            dhidden[part] = student @ weight_VD
            dweight += student.t() @ hidden_TD[part]
        return dhidden, dweight.to(weight_VD.dtype), None, None, None


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast its dtype, so that both passes multiply in it; else as they are."""
    if not torch.is_autocast_enabled("cuda"):
        return tuple(v.contiguous() for v in tensors)
    return tuple(v.to(torch.get_autocast_dtype("cuda")).contiguous() for v in tensors)


def cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int = CHUNK) -> Tensor:
    """As `ops.torch.cross_entropy`: float32 [T]; 0 where the target is -100."""
    if not fits(hidden_TD, weight_VD):
        return vectorised.cross_entropy(hidden_TD, weight_VD, targets_T, chunk)
    hidden, weight = _cast(hidden_TD, weight_VD)
    return _CrossEntropy.apply(hidden, weight, targets_T.contiguous(), chunk)


def log_prob(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int = CHUNK) -> Tensor:
    """log p(target) of each row [T]; 0 where the target is -100."""
    return -cross_entropy(hidden_TD, weight_VD, targets_T, chunk)


def kl(hidden_TD: Tensor, weight_VD: Tensor, teacher_TD: Tensor, teacher_VD: Tensor, chunk: int = CHUNK) -> Tensor:
    """As `ops.torch.kl`: float32 [T]; no gradient flows into the teacher."""
    if not fits(hidden_TD, weight_VD, teacher_TD, teacher_VD):
        return vectorised.kl(hidden_TD, weight_VD, teacher_TD, teacher_VD, chunk)
    row = _cast(hidden_TD, weight_VD, teacher_TD.detach(), teacher_VD.detach())
    return _KL.apply(*row, chunk)
