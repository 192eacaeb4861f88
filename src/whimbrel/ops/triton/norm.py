"""RMSNorm, forward and backward. A program takes R whole rows; sums are float32. T rows, D width."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.ops import torch as vectorised
from whimbrel.ops.triton.launch import cdiv, fits, power, rows, settings


@triton.jit
def _forward(x, weight, y, rstd, count, x_stride, eps, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * R + tl.arange(0, R)
    col = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (col < D)[None, :]
    place = row.to(tl.int64)[:, None]
    v = tl.load(x + place * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(v * v, 1) / D + eps)
    w = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)
    out = v * r[:, None] * w[None, :]
    tl.store(y + place * D + col[None, :], out.to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r, mask=row < count)


@triton.jit
def _backward(
    x, weight, rstd, dy, dx, dweight, count, x_stride, dy_stride,
    D: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, and the sum over this program's rows of dy * x / rms(x) in its row of `dweight`."""
    col = tl.arange(0, BLOCK)
    w = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * R + tl.arange(0, R)
        inside = (row < count)[:, None] & (col < D)[None, :]
        place = row.to(tl.int64)[:, None]
        v = tl.load(x + place * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + place * dy_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < count, other=0.0)[:, None]
        unit = v * r
        pull = tl.sum(g * w[None, :] * unit, 1) / D
        tl.store(
            dx + place * D + col[None, :],
            ((g * w[None, :] - unit * pull[:, None]) * r).to(dx.dtype.element_ty),
            mask=inside,
        )
        total += tl.sum(g * unit, 0)
    tl.store(dweight + tl.program_id(0) * D + col, total, mask=col < D)


def _shape(width: int) -> tuple[int, int, int]:
    """Rows a program, block, warps."""
    block = power(width)
    chosen = settings("norm", D=width)
    return max(1, chosen["numbers"] // block), block, max(1, min(chosen["num_warps"], block // 64))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_RD = rows(x)
        count, width = x_RD.shape
        y_RD, rstd = torch.empty(count, width, dtype=x.dtype, device=x.device), x.new_empty(count, dtype=torch.float32)
        each, block, warps = _shape(width)
        if count:
            _forward[(cdiv(count, each),)](
                x_RD, weight_D, y_RD, rstd, count, x_RD.stride(0), eps, D=width, R=each, BLOCK=block, num_warps=warps
            )
        ctx.save_for_backward(x_RD, weight_D, rstd)
        ctx.shape = x.shape
        return y_RD.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weight_D, rstd = ctx.saved_tensors
        dy_RD = rows(gradients[0])
        count, width = x_RD.shape
        each, block, warps = _shape(width)
        steps = settings("norm", D=width)["steps"]
        programs = cdiv(count, each * steps)
        dx_RD = torch.empty(count, width, dtype=x_RD.dtype, device=x_RD.device)
        partial = torch.empty(programs, width, dtype=torch.float32, device=x_RD.device)
        if count:
            _backward[(programs,)](
                x_RD, weight_D, rstd, dy_RD, dx_RD, partial, count, x_RD.stride(0), dy_RD.stride(0),
                D=width, R=each, STEPS=steps, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        return dx_RD.view(ctx.shape), partial.sum(0).to(weight_D.dtype), None


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `ops.torch.rms_norm`, in one kernel."""
    if not fits(x_TD, weight_D) or x_TD.shape[-1] > 16384:
        return vectorised.rms_norm(x_TD, weight_D, eps)
    return _Norm.apply(x_TD, weight_D.contiguous(), eps)
