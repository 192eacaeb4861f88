"""Attention over packed sequences of unlike lengths: torch's own flash kernel, which needs no padding, where it runs.

It takes bfloat16 and float16 on a GPU; the causal order is aligned with the last keys. All else, and a torch without it,
is left to `ops/torch`. Rotary positions are a kernel of ours. T queries, U keys, H heads, K key/value heads, E width,
R half of the rotating channels.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.ops import torch as vectorised
from whimbrel.ops.segments import Segments
from whimbrel.ops.triton.launch import cdiv, fits, power

try:
    from torch.nn.attention.varlen import varlen_attn

    _KNOWN = set(inspect.signature(varlen_attn).parameters)
except ImportError:
    varlen_attn, _KNOWN = None, set()  # type: ignore[assignment]


def attention(q_THE: Tensor, k_UKE: Tensor, v_UKE: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """As `ops.torch.attention`."""
    half = q_THE.dtype in (torch.bfloat16, torch.float16) and k_UKE.dtype == v_UKE.dtype == q_THE.dtype
    if varlen_attn is None or not half or not q_THE.is_cuda or not queries.tokens or q_THE.shape[2] > 256:
        return vectorised.attention(q_THE, k_UKE, v_UKE, queries, keys)
    # Its words have changed from release to release.
    words: Any = {"window_size": (-1, 0)} if "window_size" in _KNOWN else {"is_causal": True}
    if "enable_gqa" in _KNOWN and q_THE.shape[1] != k_UKE.shape[1]:
        words["enable_gqa"] = True
    y_THE = varlen_attn(
        q_THE.contiguous(),
        k_UKE.contiguous(),
        v_UKE.contiguous(),
        queries.starts.int(),
        keys.starts.int(),
        max(queries.lengths),
        max(keys.lengths),
        **words,
    )
    assert isinstance(y_THE, Tensor)
    return y_THE


@triton.jit
def _rotary(
    x, cos, sin, y, count, x_stride,
    H: tl.constexpr, E: tl.constexpr, R: tl.constexpr, BACK: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    head, r, e = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, BR), tl.arange(0, BE)
    here = x + t * x_stride + head[:, None] * E
    there = y + t * (H * E) + head[:, None] * E
    inside = (head < H)[:, None] & (r < R)[None, :]
    c = tl.load(cos + t * R + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + t * R + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    s = -s if BACK else s
    first = tl.load(here + r[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(here + R + r[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(there + r[None, :], (first * c - second * s).to(y.dtype.element_ty), mask=inside)
    tl.store(there + R + r[None, :], (second * c + first * s).to(y.dtype.element_ty), mask=inside)
    if 2 * R < E:
        rest = (head < H)[:, None] & ((e >= 2 * R) & (e < E))[None, :]
        tl.store(there + e[None, :], tl.load(here + e[None, :], mask=rest, other=0.0), mask=rest)


def _turn(x: Tensor, cos_TR: Tensor, sin_TR: Tensor, back: bool) -> Tensor:
    x = x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()
    tokens, heads, width = x.shape
    y, half = torch.empty(x.shape, dtype=x.dtype, device=x.device), cos_TR.shape[1]
    block = min(power(heads), 16)
    if x.numel():
        _rotary[(tokens, cdiv(heads, block))](
            x, cos_TR, sin_TR, y, tokens, x.stride(0), H=heads, E=width, R=half, BACK=back,
            BH=block, BR=power(half), BE=power(width), num_warps=2,
        )  # fmt: skip
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        return _turn(x_THE, cos_TR, sin_TR, False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Turning back: the rotation is orthogonal."""
        cos_TR, sin_TR = ctx.saved_tensors
        return _turn(gradients[0], cos_TR, sin_TR, True), None, None


def rotary(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """As `ops.torch.rotary`, in one kernel."""
    if not fits(x_THE) or not fits(cos_TR, sin_TR):
        return vectorised.rotary(x_THE, cos_TR, sin_TR)
    return _Rotary.apply(x_THE, cos_TR.contiguous(), sin_TR.contiguous())
