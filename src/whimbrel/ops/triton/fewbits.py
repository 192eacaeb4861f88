"""Products with weights of 8 or 4 bits that lie in rows (`ops/packed.py`): few rows, as in decoding, read each code once.

A program takes some outputs and all inputs, or a part of them where outputs alone would not fill the device; the parts
are summed in their order by a second kernel, so a run repeats bit for bit. Codes are exact in bfloat16; with up to 64
rows the sum of a group is in float32 before it meets its scale. More rows of bfloat16 (`linear_wide` of the tables) meet
weights that are made of codes and scale in registers, 128 at a time. Still more (prompts): some million weights at a
time are unpacked in one pass and meet all rows in torch's product. M rows, O outputs, I inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.ops import torch as vectorised
from whimbrel.ops.packed import SLICE, Packed
from whimbrel.ops.triton.launch import cdiv, fits, power, settings


@triton.jit
def _few(
    x, codes, scales, bias, y, rows, outputs, groups, each, x_stride, o_stride, g_stride,
    GROUP: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr, BIAS: tl.constexpr, BO: tl.constexpr,
    BM: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """y [parts, M, O] of one part of the groups; with WHOLE there is one part, and y is the result. Scales meet the sum of
    a group, or with WIDE the codes themselves, which are rounded once, so that sums go on from group to group.
    """
    o, m = tl.program_id(2) * BO + tl.arange(0, BO), tl.program_id(0) * BM + tl.arange(0, BM)
    part, wide = tl.program_id(1), GROUP * BITS // 8
    i = tl.arange(0, GROUP * BITS // 8)
    here, there = (o < outputs)[:, None], (m < rows)[None, :]
    code = codes + o.to(tl.int64)[:, None] * (groups * wide) + i[None, :]
    v_at = x + m.to(tl.int64)[None, :] * x_stride + i[:, None]
    total = tl.zeros([BO, BM], tl.float32)
    for g in range(part * each, tl.minimum(part * each + each, groups)):
        q = tl.load(code + g * wide, mask=here, other=0)
        v = tl.load(v_at + g * GROUP, mask=there, other=0.0)
        scale = tl.load(scales + o * o_stride + g * g_stride, mask=o < outputs, other=0.0).to(tl.float32)[:, None]
        by = scale if WIDE else 1.0
        sums = total if WIDE else tl.zeros([BO, BM], tl.float32)
        if BITS == 8:
            sums = tl.dot((q.to(tl.float32) * by).to(v.dtype), v, sums, input_precision=DOT)
        else:
            beyond = tl.load(v_at + g * GROUP + wide, mask=there, other=0.0)
            low, high = ((q & 15).to(tl.int8) - 8).to(tl.float32) * by, ((q >> 4).to(tl.int8) - 8).to(tl.float32) * by
            sums = tl.dot(low.to(v.dtype), v, sums, input_precision=DOT)
            sums = tl.dot(high.to(v.dtype), beyond, sums, input_precision=DOT)
        total = sums if WIDE else total + sums * scale
    if BIAS and WHOLE:
        total += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)[:, None]
    to = y + (part * rows + m).to(tl.int64)[None, :] * outputs + o[:, None]
    tl.store(to, total.to(y.dtype.element_ty), mask=here & there)


@triton.jit
def _sum(parts, bias, y, count, outputs, splits, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(0, splits):
        total += tl.load(parts + part * count + i, mask=i < count, other=0.0)
    if BIAS:
        total += tl.load(bias + i % outputs, mask=i < count, other=0.0).to(tl.float32)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=i < count)


@triton.jit
def _unpack(
    codes, scales, y, count, wide, o_stride, g_stride, GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Some bytes of codes, as they lie, to numbers; `wide` bytes are a row."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o, at = b // wide, b % wide
    g = at // (GROUP * BITS // 8)
    scale = tl.load(scales + o * o_stride + g * g_stride, mask=b < count, other=0.0).to(tl.float32)
    q = tl.load(codes + b, mask=b < count, other=0)
    if BITS == 8:
        tl.store(y + b, (q.to(tl.float32) * scale).to(y.dtype.element_ty), mask=b < count)
    else:
        to = y + 2 * b - at % (GROUP // 2)
        low, high = ((q & 15).to(tl.int8) - 8).to(tl.float32), ((q >> 4).to(tl.int8) - 8).to(tl.float32)
        tl.store(to, (low * scale).to(y.dtype.element_ty), mask=b < count)
        tl.store(to + GROUP // 2, (high * scale).to(y.dtype.element_ty), mask=b < count)


def unpack(codes: Tensor, scales: Tensor, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """The weights that some rows stand for, rounded once: [rows, I]."""
    y = torch.empty(codes.shape[0], codes.shape[1] * 8 // bits, dtype=dtype, device=codes.device)
    _unpack[(cdiv(codes.numel(), 2048),)](
        codes, scales, y, codes.numel(), codes.shape[1], *scales.stride(), GROUP=group, BITS=bits, BLOCK=2048
    )
    return y


def linear(x_TD: Tensor, weight_OD: Tensor | Packed, bias_O: Tensor | None = None) -> Tensor:
    """As `ops.torch.linear`; a kernel of its own for matrices in `rows`, without gradient. Nothing waits for the device."""
    learns = torch.is_grad_enabled() and x_TD.requires_grad
    if not isinstance(weight_OD, Packed) or weight_OD.form != "rows" or learns or not fits(x_TD, bias_O):
        return vectorised.linear(x_TD, weight_OD, bias_O)
    assert weight_OD.scales is not None and weight_OD.codes.is_contiguous()
    (outputs, inputs), scales = weight_OD.shape, weight_OD.scales
    x = x_TD.reshape(-1, inputs)
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows = x.shape[0]
    chosen = settings("linear", O=outputs, I=inputs)
    if wide := rows > chosen["rows"] and x.dtype == torch.bfloat16:
        chosen = settings("linear_wide", O=outputs, I=inputs)
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows > chosen["rows"]:
        for begin in range(0, outputs, max(1, SLICE // inputs)):
            mine = slice(begin, begin + max(1, SLICE // inputs))
            some = unpack(weight_OD.codes[mine], scales[mine], weight_OD.bits, weight_OD.group, x.dtype)
            y[:, mine] = vectorised.linear(x, some, None if bias_O is None else bias_O[mine])
    elif rows:
        groups, block = inputs // weight_OD.group, chosen["outputs"]
        blocks = cdiv(outputs, block)
        wanted = max(1, chosen["programs"] // blocks) if wide else cdiv(chosen["programs"], blocks)
        each = cdiv(groups, min(wanted, max(1, groups // 4)))
        splits, high = cdiv(groups, each), 128 if wide else min(power(rows, 16), 64)
        to = y if splits == 1 else torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
        bias = y if bias_O is None else bias_O
        _few[(cdiv(rows, high), splits, blocks)](
            x, weight_OD.codes, scales, bias, to, rows, outputs, groups, each, x.stride(0), *scales.stride(),
            GROUP=weight_OD.group, BITS=weight_OD.bits, WHOLE=splits == 1, BIAS=bias_O is not None, BO=block,
            BM=high, WIDE=wide, DOT="tf32x3" if x.dtype == torch.float32 else "tf32",
            num_warps=chosen["num_warps"], num_stages=chosen["num_stages"],
        )  # fmt: skip
        if splits > 1:
            _sum[(cdiv(y.numel(), 1024),)](to, bias, y, y.numel(), outputs, splits, BIAS=bias_O is not None, BLOCK=1024)
    return y.view(*x_TD.shape[:-1], outputs)
