"""RMSNorm(y * silu(gate)) inside each group of channels, forward and backward (arXiv 2504.03624: the gate comes first).

A program takes R rows of one group; sums are float32. T rows, D = G groups x Q channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.ops import torch as vectorised
from whimbrel.ops.triton.launch import cdiv, fits, power, rows, settings


@triton.jit
def _forward(
    y, gate, weight, out, count, y_stride, gate_stride, eps,
    Q: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    inner = tl.arange(0, BLOCK)
    col = tl.program_id(1) * Q + inner
    inside = (row < count)[:, None] & (inner < Q)[None, :]
    place = row.to(tl.int64)[:, None]
    g = tl.load(gate + place * gate_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    v = tl.load(y + place * y_stride + col[None, :], mask=inside, other=0.0).to(tl.float32) * g * tl.sigmoid(g)
    r = 1.0 / tl.sqrt(tl.sum(v * v, 1) / Q + eps)
    w = tl.load(weight + col, mask=inner < Q, other=0.0).to(tl.float32)
    tl.store(out + place * D + col[None, :], (v * r[:, None] * w[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    y, gate, weight, dout, dy, dgate, dweight, count, y_stride, gate_stride, dout_stride, eps,
    Q: tl.constexpr, D: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    inner = tl.arange(0, BLOCK)
    col = tl.program_id(1) * Q + inner
    w = tl.load(weight + col, mask=inner < Q, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * R + tl.arange(0, R)
        inside = (row < count)[:, None] & (inner < Q)[None, :]
        place = row.to(tl.int64)[:, None]
        g = tl.load(gate + place * gate_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        v = tl.load(y + place * y_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(dout + place * dout_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        gated = v * g * s
        r = 1.0 / tl.sqrt(tl.sum(gated * gated, 1) / Q + eps)[:, None]
        unit = gated * r
        pull = tl.sum(up * w * unit, 1) / Q
        dgated = (up * w - unit * pull[:, None]) * r
        tl.store(dy + place * D + col[None, :], (dgated * g * s).to(dy.dtype.element_ty), mask=inside)
        slope = s * (1.0 + g * (1.0 - s))
        tl.store(dgate + place * D + col[None, :], (dgated * v * slope).to(dgate.dtype.element_ty), mask=inside)
        total += tl.sum(up * unit, 0)
    tl.store(dweight + tl.program_id(0) * D + col, total, mask=inner < Q)


def _shape(width: int) -> tuple[int, int, int]:
    """Rows a program, block, warps."""
    block = power(width)
    chosen = settings("gated", Q=width)
    return max(1, chosen["numbers"] // block), block, max(1, min(chosen["num_warps"], block // 64))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
        count, width = y_TD.shape
        out_TD = torch.empty(count, width, dtype=y_TD.dtype, device=y_TD.device)
        each, block, warps = _shape(width // groups)
        if count:
            _forward[(cdiv(count, each), groups)](
                y_TD, gate_TD, weight_D, out_TD, count, y_TD.stride(0), gate_TD.stride(0), eps,
                Q=width // groups, D=width, R=each, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        ctx.save_for_backward(y_TD, gate_TD, weight_D)
        ctx.groups, ctx.eps = groups, eps
        return out_TD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y_TD, gate_TD, weight_D = ctx.saved_tensors
        dout = rows(gradients[0])
        count, width = y_TD.shape
        each, block, warps = _shape(width // ctx.groups)
        steps = settings("gated", Q=width // ctx.groups)["steps"]
        programs = cdiv(count, each * steps)
        dy, dgate = (torch.empty(count, width, dtype=v.dtype, device=v.device) for v in (y_TD, gate_TD))
        partial = torch.empty(programs, width, dtype=torch.float32, device=y_TD.device)
        if count:
            _backward[(programs, ctx.groups)](
                y_TD, gate_TD, weight_D, dout, dy, dgate, partial, count,
                y_TD.stride(0), gate_TD.stride(0), dout.stride(0), ctx.eps,
                Q=width // ctx.groups, D=width, R=each, STEPS=steps, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        return dy, dgate, partial.sum(0).to(weight_D.dtype), None, None


def gated_norm(y_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """As `ops.torch.gated_norm`, in one kernel."""
    if not fits(y_TD, gate_TD, weight_D) or y_TD.shape[-1] // groups > 16384:
        return vectorised.gated_norm(y_TD, gate_TD, weight_D, groups, eps)
    return _Gated.apply(rows(y_TD), rows(gate_TD), weight_D.contiguous(), groups, eps)
