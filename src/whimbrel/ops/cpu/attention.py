"""Causal attention in native code, and its gradients (native/src/attention.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from whimbrel.ops.cpu.library import address, by_tokens, call, fits, structure
from whimbrel.ops.memory import fresh
from whimbrel.ops.segments import Segments
from whimbrel.ops.torch.attention import attention as of_torch

_Attention = structure(
    "Attention", "q k v y logs queries keys", "sequences heads kv_heads width q_stride k_stride v_stride"
)
_Gradients = structure("AttentionGradients", "dy dq dk dv", "")


def _describe(row: Sequence[Tensor], cuts: Sequence[Tensor]) -> Any:
    """The C struct: q, k, v, y and logs, and where sequences begin."""
    q, k, v, *_ = row
    sizes = (len(cuts[0]) - 1, q.shape[1], *k.shape[1:], q.stride(0), k.stride(0), v.stride(0))
    return _Attention(*(address(x) for x in (*row, *cuts)), *sizes)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cuts: list[Tensor]) -> Tensor:
        row = (*(by_tokens(x) for x in (q, k, v)), fresh(*q.shape), torch.empty(q.shape[:2]))
        call("attention_forward", _describe(row, cuts))
        ctx.save_for_backward(*row)
        ctx.cuts = cuts
        return row[3]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        row = ctx.saved_tensors
        pieces = (gradients[0].contiguous(), *(fresh(*x.shape) for x in row[:3]))
        call("attention_backward", _describe(row, ctx.cuts), _Gradients(*(address(x) for x in pieces)))
        return *pieces[1:], None


def attention(q_THE: Tensor, k_UKE: Tensor, v_UKE: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """As `ops.torch.attention`, in float32 on a CPU; other dtypes and devices are left to it."""
    if not fits(q_THE, k_UKE, v_UKE) or not queries.tokens:
        return of_torch(q_THE, k_UKE, v_UKE, queries, keys)
    return _Native.apply(q_THE, k_UKE, v_UKE, [torch.tensor(cut.offsets) for cut in (queries, keys)])
