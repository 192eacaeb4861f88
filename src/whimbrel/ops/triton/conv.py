"""Causal depth-wise convolution and SiLU over packed sequences: forward, backward, and one token of many sequences.

A program takes a block of tokens of one sequence and a block of channels; what lies before the sequence comes from its
history. The taps read neighbouring rows again, which the first-level cache holds. T tokens, S sequences, I channels,
W width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.ops import torch as vectorised
from whimbrel.ops.segments import Segments
from whimbrel.ops.triton.cuts import cut
from whimbrel.ops.triton.launch import cdiv, fits, power, settings


@triton.jit
def _inputs(
    x, initial, at, start, end, s, col, inside, x_stride, I: tl.constexpr, W: tl.constexpr, HISTORY: tl.constexpr
):
    """Rows `at` of a sequence [start, end), in float32; those up to W-1 before it from its history, others zero."""
    here = (at >= start) & (at < end)
    v = tl.load(
        x + at.to(tl.int64)[:, None] * x_stride + col[None, :], mask=here[:, None] & inside[None, :], other=0.0
    ).to(tl.float32)
    if HISTORY:
        back = at - start + (W - 1)
        before = (back >= 0) & (back < W - 1)
        place = initial + s.to(tl.int64) * (I * (W - 1)) + back[:, None] * I + col[None, :]
        v += tl.load(place, mask=before[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return v


@triton.jit
def _total(
    x, weight, bias, initial, at, start, end, s, col, inside, x_stride,
    I: tl.constexpr, W: tl.constexpr, HISTORY: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """What goes into the SiLU for tokens `at`."""
    total = tl.zeros([at.shape[0], col.shape[0]], tl.float32)
    for k in tl.static_range(W):
        w = tl.load(weight + col * W + k, mask=inside, other=0.0).to(tl.float32)
        total += w[None, :] * _inputs(
            x, initial, at + (k - (W - 1)), start, end, s, col, inside, x_stride, I, W, HISTORY
        )
    if BIAS:
        total += tl.load(bias + col, mask=inside, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _forward(
    x, weight, bias, initial, y, begins, sequence, starts, x_stride,
    I: tl.constexpr, W: tl.constexpr, HISTORY: tl.constexpr, BIAS: tl.constexpr, L: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(1)
    s = tl.load(sequence + piece)
    stop, start, end = tl.load(begins + piece + 1), tl.load(starts + s), tl.load(starts + s + 1)
    at = tl.load(begins + piece) + tl.arange(0, L)
    col = tl.program_id(0) * BI + tl.arange(0, BI)
    inside = col < I
    total = _total(x, weight, bias, initial, at, start, end, s, col, inside, x_stride, I, W, HISTORY, BIAS)
    out = total * tl.sigmoid(total)
    mask = (at < stop)[:, None] & inside[None, :]
    tl.store(y + at.to(tl.int64)[:, None] * I + col[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _tails(
    x, initial, tail, starts, x_stride, I: tl.constexpr, W: tl.constexpr, HISTORY: tl.constexpr, BI: tl.constexpr
):
    """The last W-1 inputs of each sequence, history included: tail [S, W-1, I]."""
    s = tl.program_id(1)
    start, end = tl.load(starts + s), tl.load(starts + s + 1)
    col = tl.program_id(0) * BI + tl.arange(0, BI)
    inside = col < I
    for j in tl.static_range(W - 1):
        at = end - (W - 1) + j + tl.zeros([1], tl.int32)
        v = _inputs(x, initial, at, start, end, s, col, inside, x_stride, I, W, HISTORY)
        place = tail + s.to(tl.int64) * (I * (W - 1)) + j * I + col[None, :]
        tl.store(place, v.to(tail.dtype.element_ty), mask=inside[None, :])


@triton.jit
def _slope(
    x, weight, bias, initial, dy, at, start, end, s, col, inside, x_stride, dy_stride,
    I: tl.constexpr, W: tl.constexpr, HISTORY: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Gradient of what goes into the SiLU for tokens `at`; zero outside the sequence."""
    total = _total(x, weight, bias, initial, at, start, end, s, col, inside, x_stride, I, W, HISTORY, BIAS)
    mask = ((at >= start) & (at < end))[:, None] & inside[None, :]
    up = tl.load(dy + at.to(tl.int64)[:, None] * dy_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = tl.sigmoid(total)
    return up * gate * (1.0 + total * (1.0 - gate))


@triton.jit
def _onward(
    x, weight, bias, initial, dy, dtail, at, start, end, s, col, inside, x_stride, dy_stride,
    I: tl.constexpr, W: tl.constexpr, HISTORY: tl.constexpr, BIAS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Gradient of the inputs `at`: from the W outputs that see each, and from the tail that keeps it."""
    result = tl.zeros([at.shape[0], col.shape[0]], tl.float32)
    for k in tl.range(W, num_stages=1):  # a loop: W copies, unrolled, spill 30 kB a thread on sm_90
        w = tl.load(weight + col * W + k, mask=inside, other=0.0).to(tl.float32)
        seen = at + (W - 1 - k)
        result += w[None, :] * _slope(
            x, weight, bias, initial, dy, seen, start, end, s, col, inside, x_stride, dy_stride, I, W, HISTORY, BIAS
        )
    if TAIL:
        j = at - (end - (W - 1))
        mask = ((j >= 0) & (at < end))[:, None] & inside[None, :]
        place = dtail + s.to(tl.int64) * (I * (W - 1)) + j[:, None] * I + col[None, :]
        result += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    return result


@triton.jit
def _backward(
    x, weight, bias, initial, dy, dtail, dx, dweight, dbias, begins, sequence, starts, x_stride, dy_stride,
    I: tl.constexpr, W: tl.constexpr, HISTORY: tl.constexpr, BIAS: tl.constexpr, TAIL: tl.constexpr,
    L: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """dx of a block, and its part of dweight [n, W, I] and dbias [n, I]."""
    piece = tl.program_id(1)
    s = tl.load(sequence + piece)
    stop, start, end = tl.load(begins + piece + 1), tl.load(starts + s), tl.load(starts + s + 1)
    at = tl.load(begins + piece) + tl.arange(0, L)
    col = tl.program_id(0) * BI + tl.arange(0, BI)
    inside = col < I
    result = _onward(
        x, weight, bias, initial, dy, dtail, at, start, end, s, col, inside, x_stride, dy_stride,
        I, W, HISTORY, BIAS, TAIL,
    )  # fmt: skip
    mask = (at < stop)[:, None] & inside[None, :]
    tl.store(dx + at.to(tl.int64)[:, None] * I + col[None, :], result.to(dx.dtype.element_ty), mask=mask)
    own = _slope(x, weight, bias, initial, dy, at, start, end, s, col, inside, x_stride, dy_stride, I, W, HISTORY, BIAS)
    own = tl.where(mask, own, 0.0)
    for k in tl.static_range(W):
        v = _inputs(x, initial, at + (k - (W - 1)), start, end, s, col, inside, x_stride, I, W, HISTORY)
        tl.store(dweight + piece.to(tl.int64) * (W * I) + k * I + col, tl.sum(own * v, 0), mask=inside)
    if BIAS:
        tl.store(dbias + piece.to(tl.int64) * I + col, tl.sum(own, 0), mask=inside)


@triton.jit
def _histories(
    x, weight, bias, initial, dy, dtail, dinitial, starts, x_stride, dy_stride,
    I: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, TAIL: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Gradient of the W-1 inputs before each sequence: dinitial [S, W-1, I]."""
    s = tl.program_id(1)
    start, end = tl.load(starts + s), tl.load(starts + s + 1)
    col = tl.program_id(0) * BI + tl.arange(0, BI)
    inside = col < I
    for j in tl.static_range(W - 1):
        at = start - (W - 1) + j + tl.zeros([1], tl.int32)
        result = _onward(
            x, weight, bias, initial, dy, dtail, at, start, end, s, col, inside, x_stride, dy_stride,
            I, W, True, BIAS, TAIL,
        )  # fmt: skip
        tl.store(
            dinitial + s.to(tl.int64) * (I * (W - 1)) + j * I + col[None, :],
            result.to(dinitial.dtype.element_ty),
            mask=inside[None, :],
        )


@triton.jit
def _step(
    x, weight, bias, tail, slots, y, x_stride, slot_stride, channel_stride, place_stride,
    I: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    col = tl.program_id(0) * BI + tl.arange(0, BI)
    inside = col < I
    base = tail + tl.load(slots + s).to(tl.int64) * slot_stride + col * channel_stride
    new = tl.load(x + s.to(tl.int64) * x_stride + col, mask=inside, other=0.0)
    total = new.to(tl.float32) * tl.load(weight + col * W + (W - 1), mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(W - 1):
        old = tl.load(base + k * place_stride, mask=inside, other=0.0)
        total += old.to(tl.float32) * tl.load(weight + col * W + k, mask=inside, other=0.0).to(tl.float32)
        if k > 0:
            tl.store(base + (k - 1) * place_stride, old, mask=inside)
    if W > 1:
        tl.store(base + (W - 2) * place_stride, new.to(tail.dtype.element_ty), mask=inside)
    if BIAS:
        total += tl.load(bias + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + s.to(tl.int64) * I + col, (total * tl.sigmoid(total)).to(y.dtype.element_ty), mask=inside)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_IW: Tensor, bias_I: Tensor | None, history: Tensor | None, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        """`history` and the tail are [S, W-1, I] here."""
        channels, width = weight_IW.shape
        chosen = settings("conv", W=width)
        most = min(chosen["tokens"], power(max(segments.lengths, default=1)))
        cuts = cut(segments.lengths, (), most, most, x_TI.device)
        y_TI = torch.empty(x_TI.shape, dtype=x_TI.dtype, device=x_TI.device)
        tail = torch.empty(segments.count, width - 1, channels, dtype=x_TI.dtype, device=x_TI.device)
        block = min(chosen["channels"], power(channels, 16))
        shape = {
            "I": channels,
            "W": width,
            "HISTORY": history is not None,
            "BI": block,
            "num_warps": chosen["num_warps"],
        }
        bias, before = (x_TI if v is None else v for v in (bias_I, history))
        parts = cdiv(channels, block)
        if cuts.pieces:
            _forward[(parts, cuts.pieces)](
                x_TI, weight_IW, bias, before, y_TI, cuts.begins, cuts.sequence, cuts.starts, x_TI.stride(0),
                **shape, BIAS=bias_I is not None, L=most,
            )  # fmt: skip
        if tail.numel():
            _tails[(parts, segments.count)](x_TI, before, tail, cuts.starts, x_TI.stride(0), **shape)
        ctx.save_for_backward(x_TI, weight_IW, bias_I, history)
        ctx.cuts, ctx.most, ctx.shape, ctx.parts = cuts, most, shape, parts
        ctx.set_materialize_grads(False)
        return y_TI, tail

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x_TI, weight_IW, bias_I, history = ctx.saved_tensors
        dy, dtail = gradients
        dy = torch.zeros_like(x_TI) if dy is None else dy if dy.stride(-1) == 1 else dy.contiguous()
        dtail = None if dtail is None else dtail.contiguous()
        bias, before, up = (x_TI if v is None else v for v in (bias_I, history, dtail))
        cuts, shape = ctx.cuts, dict(ctx.shape)
        flags = {"BIAS": bias_I is not None, "TAIL": dtail is not None}
        (channels, width), count = weight_IW.shape, len(cuts.starts) - 1
        dx = torch.empty(x_TI.shape, dtype=x_TI.dtype, device=x_TI.device)
        dweight = torch.empty(cuts.pieces, width, channels, dtype=torch.float32, device=x_TI.device)
        dbias = torch.empty(cuts.pieces, channels, dtype=torch.float32, device=x_TI.device)
        strides = (x_TI.stride(0), dy.stride(0))
        if cuts.pieces:
            _backward[(ctx.parts, cuts.pieces)](
                x_TI, weight_IW, bias, before, dy, up, dx, dweight, dbias, cuts.begins, cuts.sequence, cuts.starts, *strides,
                **shape, **flags, L=ctx.most,
            )  # fmt: skip
        dhistory = None
        if history is not None:
            dhistory = torch.empty_like(history)
            shape.pop("HISTORY")
            if dhistory.numel():
                _histories[(ctx.parts, count)](
                    x_TI, weight_IW, bias, before, dy, up, dhistory, cuts.starts, *strides, **shape, **flags
                )
        dbias_I = None if bias_I is None else dbias.sum(0).to(bias_I.dtype)
        return dx, dweight.sum(0).t().to(weight_IW.dtype), dbias_I, dhistory, None


def conv(
    x_TI: Tensor, weight_IW: Tensor, bias_I: Tensor | None, segments: Segments, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `ops.torch.conv`: y_TI, and the last W-1 inputs of each sequence tail_SI(W-1)."""
    if not fits(x_TI, weight_IW, bias_I, initial):
        return vectorised.conv(x_TI, weight_IW, bias_I, segments, initial)
    x_TI = x_TI if x_TI.stride(-1) == 1 else x_TI.contiguous()
    history = None if initial is None else initial.to(x_TI.dtype).transpose(1, 2).contiguous()
    bias = None if bias_I is None else bias_I.contiguous()
    y_TI, tail = _Conv.apply(x_TI, weight_IW.contiguous(), bias, history, segments)
    return y_TI, tail.transpose(1, 2)


def conv_step(x_SI: Tensor, weight_IW: Tensor, bias_I: Tensor | None, tail: Tensor, slots_S: Tensor) -> Tensor:
    """One token of each sequence: y_SI; `tail[slots]` [I, W-1] is advanced in place. No gradient."""
    if not fits(x_SI, weight_IW, bias_I, tail):
        return vectorised.conv_step(x_SI, weight_IW, bias_I, tail, slots_S)
    x_SI = x_SI if x_SI.stride(-1) == 1 else x_SI.contiguous()
    channels, width = weight_IW.shape
    chosen = settings("conv_step", W=width)
    block = min(chosen["channels"], power(channels, 16))
    y_SI = torch.empty(x_SI.shape, dtype=x_SI.dtype, device=x_SI.device)
    if len(x_SI):
        _step[(cdiv(channels, block), len(x_SI))](
            x_SI, weight_IW.contiguous(), x_SI if bias_I is None else bias_I, tail, slots_S, y_SI, x_SI.stride(0), *tail.stride(),
            I=channels, W=width, BIAS=bias_I is not None, BI=block, num_warps=chosen["num_warps"],
        )  # fmt: skip
    return y_SI
