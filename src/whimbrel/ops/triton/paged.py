"""One query of each sequence over keys and values in blocks, the context split over programs and combined afterwards.

All query heads that share a key head are taken together, so keys and values are read once. The cut of a context depends
on its length alone, so a sequence's result does not depend on its batch mates. S sequences, H heads, K key/value heads,
E head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.ops import torch as vectorised
from whimbrel.ops.triton.launch import cdiv, fits, power, settings


@triton.jit
def _split(
    q, k, v, table, lengths, parts, stats, scale, q_stride, table_stride, splits,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr,
    BH: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A part of one context: weighted values, not yet divided, and their largest score (base 2) and sum of weights."""
    part, head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + s).to(tl.int32)
    begin = part * SPLIT
    end = tl.minimum(begin + SPLIT, length)
    if begin < end:
        shared: tl.constexpr = H // K
        row, e = tl.arange(0, BH), tl.arange(0, BE)
        mine = (row < shared)[:, None] & (e < E)[None, :]
        qs = tl.load(q + s * q_stride + (head * shared + row)[:, None] * E + e[None, :], mask=mine, other=0.0)
        most = tl.full([BH], float("-inf"), tl.float32)
        weights = tl.zeros([BH], tl.float32)
        total = tl.zeros([BH, BE], tl.float32)
        for at in range(begin, end, TILE):
            i = at + tl.arange(0, TILE)
            real = i < end
            block = tl.load(table + s * table_stride + i // SIZE, mask=real, other=0).to(tl.int64)
            place = ((block * SIZE + i % SIZE) * K + head)[:, None] * E + e[None, :]
            inside = real[:, None] & (e < E)[None, :]
            keys = tl.load(k + place, mask=inside, other=0.0).to(qs.dtype)
            scores = tl.dot(qs, tl.trans(keys), input_precision=DOT) * scale
            scores = tl.where(real[None, :], scores, float("-inf"))
            higher = tl.maximum(most, tl.max(scores, 1))
            fade = tl.exp2(most - higher)
            p = tl.exp2(scores - higher[:, None])
            values = tl.load(v + place, mask=inside, other=0.0).to(qs.dtype)
            total = tl.dot(p.to(qs.dtype), values, total * fade[:, None], input_precision=DOT)
            weights = weights * fade + tl.sum(p, 1)
            most = higher
        to = (s * splits + part) * H + head * shared + row
        tl.store(parts + to[:, None] * E + e[None, :], total, mask=mine)
        tl.store(stats + to * 2, most, mask=row < shared)
        tl.store(stats + to * 2 + 1, weights, mask=row < shared)


@triton.jit
def _combine(
    parts, stats, lengths, y, splits,
    H: tl.constexpr, E: tl.constexpr, SPLIT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    head, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    e = tl.arange(0, BE)
    length = tl.load(lengths + s).to(tl.int32)
    most, weights = float("-inf"), 0.0
    total = tl.zeros([BE], tl.float32)
    for part in range(0, tl.cdiv(length, SPLIT)):
        at = (s * splits + part) * H + head
        peak, sum_ = tl.load(stats + at * 2), tl.load(stats + at * 2 + 1)
        higher = tl.maximum(most, peak)
        fade, scale = tl.exp2(most - higher), tl.exp2(peak - higher)
        total = total * fade + tl.load(parts + at * E + e, mask=e < E, other=0.0) * scale
        weights = weights * fade + sum_ * scale
        most = higher
    total = total / tl.where(weights > 0, weights, 1.0)
    tl.store(y + (s * H + head) * E + e, total.to(y.dtype.element_ty), mask=e < E)


def paged_attention(
    q_SHE: Tensor, k_blocks: Tensor, v_blocks: Tensor, table: Tensor, lengths: Sequence[int] | Tensor
) -> Tensor:
    """As `ops.torch.paged_attention`. No gradient. `lengths` may be a tensor on the device (each at least 1); as many
    parts of a context then run as the table has room for.
    """
    if not fits(q_SHE) or q_SHE.shape[0] > 65535:
        lengths = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        return vectorised.paged_attention(q_SHE, k_blocks, v_blocks, table, lengths)
    (sequences, heads, width), (size, kv_heads) = q_SHE.shape, k_blocks.shape[1:3]
    longest = table.shape[1] * size if isinstance(lengths, Tensor) else max(lengths, default=0)
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(lengths, dtype=torch.int64).to(q_SHE.device, non_blocking=True)
    q = q_SHE if q_SHE.stride(-1) == 1 and q_SHE.stride(1) == width else q_SHE.contiguous()
    y = torch.empty(q_SHE.shape, dtype=q_SHE.dtype, device=q_SHE.device)
    chosen = settings("paged", E=width)
    splits = max(1, cdiv(longest, chosen["split"]))
    parts = torch.empty(sequences, splits, heads, width, dtype=torch.float32, device=q.device)
    stats = torch.empty(sequences, splits, heads, 2, dtype=torch.float32, device=q.device)
    assert k_blocks.is_contiguous() and v_blocks.is_contiguous() and table.stride(-1) == 1
    if sequences:
        _split[(splits, kv_heads, sequences)](
            q, k_blocks, v_blocks, table, lengths, parts, stats, width**-0.5 * 1.4426950408889634,
            q.stride(0), table.stride(0), splits,
            H=heads, K=kv_heads, E=width, SIZE=size, SPLIT=chosen["split"], TILE=chosen["tile"],
            BH=power(heads // kv_heads, 16), BE=power(width, 16), DOT="tf32x3" if q.dtype == torch.float32 else "tf32",
            num_warps=chosen["num_warps"], num_stages=chosen["num_stages"],
        )  # fmt: skip
        _combine[(heads, sequences)](
            parts, stats, lengths, y, splits, H=heads, E=width, SPLIT=chosen["split"], BE=power(width, 16), num_warps=2
        )
    return y
