"""Grouped-query attention, one sequence, one head, one query at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from whimbrel.ops.segments import Segments


def attention(q_THE: Tensor, k_UKE: Tensor, v_UKE: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """Causal attention inside each sequence: y_THE. Scale E^-0.5.

    `keys` cuts U keys and values into the same sequences; where a sequence has more keys than queries, the queries are
    its last tokens.
    """
    shared = q_THE.shape[1] // k_UKE.shape[1]
    y_THE = torch.zeros_like(q_THE)
    for s, (n, m) in enumerate(zip(queries.lengths, keys.lengths, strict=True)):
        for i in range(n):
            seen = slice(keys.offsets[s], keys.offsets[s] + m - n + i + 1)
            for h in range(q_THE.shape[1]):
                query_E = q_THE[queries.offsets[s] + i, h]
                scores = (k_UKE[seen, h // shared] @ query_E) * query_E.shape[0] ** -0.5
                y_THE[queries.offsets[s] + i, h] = torch.softmax(scores, dim=0) @ v_UKE[seen, h // shared]
    return y_THE


def paged_attention(q_SHE: Tensor, k_blocks: Tensor, v_blocks: Tensor, table: Tensor, lengths: Sequence[int]) -> Tensor:
    """One query of each sequence over the first `lengths[s]` keys of its blocks [blocks, block size, K, E]: y_SHE."""
    outputs = []
    for s, length in enumerate(lengths):
        k_LKE = k_blocks[table[s]].flatten(0, 1)[:length].to(q_SHE.dtype)
        v_LKE = v_blocks[table[s]].flatten(0, 1)[:length].to(q_SHE.dtype)
        outputs.append(attention(q_SHE[s : s + 1], k_LKE, v_LKE, Segments.of([1]), Segments.of([length])))
    return torch.cat(outputs)


def rotary(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Turn the pairs (i, i + R) of the first 2R channels of each head (rotate-half, arXiv 2104.09864)."""
    turned = x_THE.clone()
    half = cos_TR.shape[1]
    for t in range(x_THE.shape[0]):
        cos, sin = cos_TR[t].to(x_THE.dtype), sin_TR[t].to(x_THE.dtype)
        first, second = x_THE[t, :, :half], x_THE[t, :, half : 2 * half]
        turned[t, :, :half] = first * cos - second * sin
        turned[t, :, half : 2 * half] = second * cos + first * sin
    return turned
