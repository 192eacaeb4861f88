"""Squared ReLU, SwiGLU and step sizes: one read, one write, forward and backward, in float32 arithmetic.

Step sizes come as columns of a wider row, so rows may lie apart. T rows, H heads, R numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.ops import torch as vectorised
from whimbrel.ops.triton.launch import cdiv, fits, settings


@triton.jit
def _relu2(x, up, out, count, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.maximum(tl.load(x + i, mask=i < count, other=0.0).to(tl.float32), 0.0)
    if BACKWARD:
        v = 2.0 * v * tl.load(up + i, mask=i < count, other=0.0).to(tl.float32)
    else:
        v = v * v
    tl.store(out + i, v.to(out.dtype.element_ty), mask=i < count)


@triton.jit
def _swiglu(gate, x, up, out, dx, count, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < count, other=0.0).to(tl.float32)
    v = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    if BACKWARD:
        d = tl.load(up + i, mask=i < count, other=0.0).to(tl.float32)
        tl.store(out + i, (d * v * s * (1.0 + g * (1.0 - s))).to(out.dtype.element_ty), mask=i < count)
        tl.store(dx + i, (d * g * s).to(dx.dtype.element_ty), mask=i < count)
    else:
        tl.store(out + i, (g * s * v).to(out.dtype.element_ty), mask=i < count)


@triton.jit
def _step(
    dt, bias, up, out, rows, stride, low, high,
    H: tl.constexpr, BACKWARD: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    col = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < H)[None, :]
    b = tl.load(bias + col, mask=col < H, other=0.0).to(tl.float32)[None, :]
    v = tl.load(dt + row.to(tl.int64)[:, None] * stride + col[None, :], mask=inside, other=0.0).to(tl.float32) + b
    e = tl.exp(-tl.abs(v))
    near = 1.0 + e
    # log(1 + e) without losing a small e: the error of rounding 1 + e is divided out.
    soft = tl.maximum(v, 0.0) + tl.where(near == 1.0, e, tl.log(near) * e / tl.where(near == 1.0, 1.0, near - 1.0))
    if BACKWARD:
        d = tl.load(up + row[:, None] * H + col[None, :], mask=inside, other=0.0)
        open = (soft >= low) & (soft <= high)
        tl.store(out + row[:, None] * H + col[None, :], tl.where(open, d * tl.sigmoid(v), 0.0), mask=inside)
    else:
        soft = tl.minimum(tl.maximum(soft, low), high)
        tl.store(out + row[:, None] * H + col[None, :], soft, mask=inside)


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return _relu2_run(x, x, backward=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _relu2_run(x, gradients[0].contiguous(), backward=True)


def _relu2_run(x: Tensor, up: Tensor, backward: bool) -> Tensor:
    out, chosen = torch.empty_like(x), settings("pointwise")
    if x.numel():
        grid = (cdiv(x.numel(), chosen["block"]),)
        _relu2[grid](x, up, out, x.numel(), BACKWARD=backward, BLOCK=chosen["block"], num_warps=chosen["num_warps"])
    return out


def relu2(x: Tensor) -> Tensor:
    """As `ops.torch.relu2`, in one kernel; its backward pass keeps the input alone."""
    return _Relu2.apply(x) if fits(x) else vectorised.relu2(x)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        gate, x = gate.contiguous(), x.contiguous()
        ctx.save_for_backward(gate, x)
        return _swiglu_run(gate, x, None)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        gate, x = ctx.saved_tensors
        return _swiglu_run(gate, x, gradients[0].contiguous())


def _swiglu_run(gate: Tensor, x: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    out, dx, chosen = torch.empty_like(gate), x, settings("pointwise")
    if up is not None:
        dx = torch.empty_like(x)
    if x.numel():
        _swiglu[(cdiv(x.numel(), chosen["block"]),)](
            gate, x, x if up is None else up, out, dx, x.numel(),
            BACKWARD=up is not None, BLOCK=chosen["block"], num_warps=chosen["num_warps"],
        )  # fmt: skip
    return out, dx


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `ops.torch.swiglu`, in one kernel."""
    same = gate.dtype == up.dtype and gate.shape == up.shape
    return _Swiglu.apply(gate, up) if same and fits(gate, up) else vectorised.swiglu(gate, up)


class _StepSize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dt_TH: Tensor, bias_H: Tensor, limit: tuple[float, float]) -> Tensor:
        dt_TH = dt_TH if dt_TH.stride(-1) == 1 else dt_TH.contiguous()
        ctx.save_for_backward(dt_TH, bias_H)
        ctx.limit = limit
        return _step_run(dt_TH, bias_H, limit, None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dt_TH, bias_H = ctx.saved_tensors
        slope = _step_run(dt_TH, bias_H, ctx.limit, gradients[0].contiguous())
        return slope.to(dt_TH.dtype), slope.sum(0).to(bias_H.dtype), None


def _step_run(dt_TH: Tensor, bias_H: Tensor, limit: tuple[float, float], up: Tensor | None) -> Tensor:
    count, heads = dt_TH.shape
    out = torch.empty(count, heads, dtype=torch.float32, device=dt_TH.device)
    block = 1 << max(0, heads - 1).bit_length()
    each = max(1, settings("pointwise")["block"] // block)
    if count:
        _step[(cdiv(count, each),)](
            dt_TH, bias_H, out if up is None else up, out, count, dt_TH.stride(0), *limit,
            H=heads, BACKWARD=up is not None, R=each, BLOCK=block,
        )  # fmt: skip
    return out


def step_size(dt_TH: Tensor, bias_H: Tensor, limit: tuple[float, float]) -> Tensor:
    """As `ops.torch.step_size`, in one kernel."""
    if not fits(dt_TH, bias_H) or dt_TH.dim() != 2:
        return vectorised.step_size(dt_TH, bias_H, limit)
    return _StepSize.apply(dt_TH, bias_H.contiguous(), limit)
