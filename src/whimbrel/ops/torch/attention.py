"""Grouped-query attention over packed sequences through torch's fused kernel. T queries, U keys, S sequences, H heads,
K key/value heads, E width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from whimbrel.ops.segments import Segments, put

MASKED = 1 << 22
"""Pairs of a query and a key for which torch may build one mask (13 bytes a pair on a CPU)."""


def attention(q_THE: Tensor, k_UKE: Tensor, v_UKE: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """Causal attention inside each sequence: y_THE. Scale E^-0.5.

    `keys` cuts U keys and values into the same sequences; where a sequence has more keys than queries, the queries are
    its last tokens. Sequences of one length without history share a call; so do many short ones: filled up at the end
    to one length, which causal order makes invisible.
    """
    if queries.lengths == keys.lengths and len(set(queries.lengths)) == 1 and len(q_THE):
        length = queries.lengths[0]
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_THE, k_UKE, v_UKE))
        return _fused(q, k, v, length, length).transpose(1, 2).flatten(0, 1)
    if queries.lengths == keys.lengths and queries.count > 4:
        return _together(q_THE, k_UKE, v_UKE, queries)
    parts = []
    for s, (n, m) in enumerate(zip(queries.lengths, keys.lengths, strict=True)):
        if n:
            query = slice(queries.offsets[s], queries.offsets[s + 1])
            key = slice(keys.offsets[s], keys.offsets[s + 1])
            q, k, v = (x.transpose(0, 1)[None] for x in (q_THE[query], k_UKE[key], v_UKE[key]))
            parts.append(_fused(q, k, v, n, m)[0].transpose(0, 1))
    return torch.cat(parts) if parts else torch.zeros_like(q_THE)


def _fused(q: Tensor, k: Tensor, v: Tensor, n: int, m: int) -> Tensor:
    """[B, H, n, E] over [B, K, m, E], queries aligned with the last keys."""
    grouped = q.shape[1] != k.shape[1]
    if n == m:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    rows = max(1, MASKED // m)
    if n > rows:  # a long history: some queries at a time, each with the keys up to its last one
        ends = [min(n, begin + rows) for begin in range(0, n, rows)]
        return torch.cat(
            [
                _fused(q[:, :, begin:end], k[:, :, : m - n + end], v[:, :, : m - n + end], end - begin, m - n + end)
                for begin, end in zip([0, *ends], ends, strict=False)
            ],
            dim=2,
        )
    if n == 1:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(n, m), enable_gqa=grouped)


def _together(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, segments: Segments) -> Tensor:
    """Sequences of like length (the longest at most twice the shortest) share one call."""
    order = sorted((s for s, n in enumerate(segments.lengths) if n), key=lambda s: segments.lengths[s])
    y_THE = torch.zeros_like(q_THE)
    rows: list[Tensor] = []
    parts: list[Tensor] = []
    while order:
        shortest = segments.lengths[order[0]]
        bucket = [s for s in order if segments.lengths[s] <= 2 * shortest]
        order = order[len(bucket) :]
        longest = segments.lengths[bucket[-1]]
        begin_B1 = torch.tensor([segments.offsets[s] for s in bucket])[:, None]
        length_B1 = torch.tensor([segments.lengths[s] for s in bucket])[:, None]
        inside_L = torch.arange(longest)  # on the host, which knows the lengths: it waits for no device
        b_N, l_N = (put(place, q_THE.device) for place in (inside_L < length_B1).nonzero(as_tuple=True))
        token_BL = put(begin_B1 + inside_L.minimum(length_B1 - 1), q_THE.device)
        q, k, v = (x[token_BL].transpose(1, 2) for x in (q_THE, k_THE, v_THE))
        y_BLHE = _fused(q, k, v, longest, longest).transpose(1, 2)
        rows.append(token_BL[b_N, l_N])
        parts.append(y_BLHE[b_N, l_N])
    return y_THE.index_copy(0, torch.cat(rows), torch.cat(parts)) if parts else y_THE


def paged_attention(q_SHE: Tensor, k_blocks: Tensor, v_blocks: Tensor, table: Tensor, lengths: Sequence[int]) -> Tensor:
    """One query of each sequence over the first `lengths[s]` keys of its blocks [blocks, block size, K, E]: y_SHE. No
    gradient. Keys and values may be of fewer bits.
    """
    block_size, kv_heads, width = k_blocks.shape[1:]
    y_SHE = torch.empty_like(q_SHE)
    scaled = (q_SHE * width**-0.5).unflatten(1, (kv_heads, -1))
    for s, length in enumerate(lengths):
        blocks = table[s, : -(-length // block_size)]
        k_KLE, v_KLE = (_history(x, blocks, length).transpose(0, 1).to(q_SHE.dtype) for x in (k_blocks, v_blocks))
        weights = torch.bmm(scaled[s], k_KLE.transpose(1, 2)).softmax(-1)
        y_SHE[s] = torch.bmm(weights, v_KLE).flatten(0, 1)
    return y_SHE


def _history(pool: Tensor, blocks: Tensor, length: int) -> Tensor:
    """[length, K, E]: a view where the blocks are neighbours, a copy elsewhere."""
    first, count = int(blocks[0]), len(blocks)
    if pool.device.type == "cpu" and int(blocks[-1]) - first == count - 1 and bool((blocks.diff() == 1).all()):
        return pool[first : first + count].flatten(0, 1)[:length]
    return pool[blocks].flatten(0, 1)[:length]


def rotary(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Turn the pairs (i, i + R) of the first 2R channels of each head (rotate-half, arXiv 2104.09864)."""
    half = cos_TR.shape[1]
    dtype = torch.promote_types(x_THE.dtype, torch.float32)
    cos, sin = cos_TR[:, None].to(dtype), sin_TR[:, None].to(dtype)
    first, second = x_THE[..., :half].to(dtype), x_THE[..., half : 2 * half].to(dtype)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_THE.dtype)
    return turned if 2 * half == x_THE.shape[2] else torch.cat([turned, x_THE[..., 2 * half :]], dim=-1)
