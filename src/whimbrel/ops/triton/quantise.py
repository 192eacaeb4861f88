"""Casts to FP8 in one pass over the numbers: with a scale for each 1 x 128 block or each row, or with one given scale.

With `RELU2` the squared ReLU comes first, so that the wide hidden row of a feed-forward layer is written once, in 8 bits.
T rows, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.ops.triton.launch import cdiv, power

LARGEST = 448.0
"""Of E4M3."""


@triton.jit
def _blocks(x, codes, scales, rows, stride, D: tl.constexpr, R: tl.constexpr, RELU2: tl.constexpr):
    """codes [T, D] and, by columns, scales [D/128, T]: x = codes * scale."""
    row, col = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (col < D)[None, :]
    far = row.to(tl.int64)[:, None]
    v = tl.load(x + far * stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if RELU2:
        v = tl.maximum(v, 0.0)
        v = v * v
    scale = tl.maximum(tl.max(tl.abs(v), 1), 1e-12) / 448.0
    v = tl.minimum(tl.maximum(v / scale[:, None], -448.0), 448.0)
    tl.store(codes + far * D + col[None, :], v.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + tl.program_id(1) * rows + row, scale, mask=row < rows)


@triton.jit
def _whole(x, inverse, codes, count, MOST: tl.constexpr, RELU2: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    if RELU2:
        v = tl.maximum(v, 0.0)
        v = v * v
    v = tl.minimum(tl.maximum(v * tl.load(inverse), -MOST), MOST)
    tl.store(codes + i, v.to(codes.dtype.element_ty), mask=i < count)


@triton.jit
def _rows(x, codes, scales, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """A row: its largest value, the power of two from a 448th of it on, then the codes (read again from the cache)."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    peaks = tl.zeros([BLOCK], tl.float32)
    for at in range(0, D, BLOCK):
        peaks = tl.maximum(peaks, tl.abs(tl.load(x + row * stride + at + i, mask=at + i < D, other=0.0).to(tl.float32)))
    least = tl.maximum(tl.max(peaks, 0), 1e-12) / 448.0
    # Up to the next power of two: a carry into the exponent unless the mantissa is zero.
    scale = ((least.to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)
    for at in range(0, D, BLOCK):
        v = tl.load(x + row * stride + at + i, mask=at + i < D, other=0.0).to(tl.float32) / scale
        v = tl.minimum(tl.maximum(v, -448.0), 448.0)
        tl.store(codes + row * D + at + i, v.to(codes.dtype.element_ty), mask=at + i < D)
    tl.store(scales + row, scale)


def by_rows(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """codes [T, D] in E4M3 and scales [T, 1] float32, powers of two: x = codes * scale."""
    rows, width = x_TD.shape
    assert x_TD.stride(1) == 1, "numbers of a row are neighbours"
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x_TD.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x_TD.device)
    if rows:
        _rows[(rows,)](x_TD, codes, scales, x_TD.stride(0), D=width, BLOCK=power(min(width, 2048)), num_warps=4)
    return codes, scales


def by_blocks(x_TD: Tensor, relu2: bool = False) -> tuple[Tensor, Tensor]:
    """codes [T, D] in E4M3 and scales [T, D/128] float32, whose columns are contiguous (as CUDA's product wants them)."""
    rows, width = x_TD.shape
    assert x_TD.stride(1) == 1, "numbers of a row are neighbours"
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x_TD.device)
    scales = torch.empty(cdiv(width, 128), rows, dtype=torch.float32, device=x_TD.device)
    if rows:
        grid = (cdiv(rows, 32), cdiv(width, 128))
        _blocks[grid](x_TD, codes, scales, rows, x_TD.stride(0), D=width, R=32, RELU2=relu2, num_warps=4)
    return codes, scales.t()


def by_tensor(x_TD: Tensor, scale: Tensor, relu2: bool = False, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """codes of x / scale (a float32 scalar on the device) in E4M3 or E5M2; what is too large is clamped."""
    x, count = x_TD.contiguous(), x_TD.numel()
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    if count:
        _whole[(cdiv(count, 4096),)](
            x, scale.reciprocal(), codes, count, MOST=torch.finfo(dtype).max, RELU2=relu2, BLOCK=4096, num_warps=8
        )
    return codes


def relu2_scale(x_TD: Tensor) -> Tensor:
    """The scale of a whole tensor's squared ReLU: its largest value is the square of x's largest."""
    return x_TD.amax().float().clamp(min=0).square().clamp(min=1e-12) / LARGEST
