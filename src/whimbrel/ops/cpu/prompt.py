"""Attention of prompts in native code (native/src/attention.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from whimbrel.ops.cpu.library import address, by_tokens, call, fits, structure
from whimbrel.ops.memory import fresh
from whimbrel.ops.segments import Segments
from whimbrel.ops.torch.attention import attention as of_torch

_Attention = structure("Attention", "q k v y queries keys", "sequences heads kv_heads width q_stride k_stride v_stride")


def prompt_attention(q_THE: Tensor, k_UKE: Tensor, v_UKE: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """As `ops.torch.attention`, in float32 on a CPU where no gradient is wanted; all else is left to it."""
    row = (q_THE, k_UKE, v_UKE)
    learn = torch.is_grad_enabled() and any(x.requires_grad for x in row)
    if learn or not fits(*row) or not queries.tokens:
        return of_torch(*row, queries, keys)
    q, k, v = (by_tokens(x.detach()) for x in row)
    y_THE, cuts = fresh(*q.shape), [torch.tensor(cut.offsets) for cut in (queries, keys)]
    sizes: Sequence[int] = (queries.count, q.shape[1], k.shape[1], q.shape[2], q.stride(0), k.stride(0), v.stride(0))
    call("attention", _Attention(*(address(x) for x in (q, k, v, y_THE, *cuts)), *sizes))
    return y_THE
