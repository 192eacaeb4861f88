"""Causal depth-wise convolution with SiLU, as W shifted multiply-adds (torch's own depth-wise conv1d is several times
slower on a CPU).

T tokens, S sequences, I channels, W width. Before each sequence W-1 rows are inserted, its history; then the
convolution runs over all rows at once and the rows that belong to tokens are taken out. The history isolates the
sequences.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from whimbrel.ops.segments import Segments


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve training too, whoever asks first
def _rows(lengths: tuple[int, ...], history: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the tokens [T], of the histories [S, W-1] and of the last W-1 inputs of each sequence [S, W-1]."""
    tokens, before, tails = [], [], []
    at = 0
    back = torch.arange(history)
    for length in lengths:
        before.append(at + back)
        tokens.append(torch.arange(at + history, at + history + length))
        tails.append(at + length + back)
        at += history + length
    return tuple(torch.cat(v).to(device) for v in (tokens, before, tails))  # type: ignore[return-value]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_WI: Tensor, bias_I: Tensor | None, initial: Tensor, rows: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """`initial` and the tail are [S, W-1, I] here, rows of the same memory layout as x."""
        tokens, before, tails = rows
        width, channels = weight_WI.shape
        padded = x_TI.new_empty(x_TI.shape[0] + before.shape[0], channels)
        padded[tokens] = x_TI
        padded[before] = initial.flatten(0, 1)
        valid = padded.shape[0] - width + 1
        total = padded[:valid] * weight_WI[0]
        for k in range(1, width):
            total.addcmul_(padded[k : k + valid], weight_WI[k])
        if bias_I is not None:
            total += bias_I
        total = total[tokens - (width - 1)]
        ctx.save_for_backward(padded, weight_WI, total, *rows)
        ctx.biased = bias_I is not None
        return F.silu(total), padded[tails].view_as(initial)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        dy_TI, dtail = gradients
        padded, weight_WI, total, tokens, before, tails = ctx.saved_tensors
        width, channels = weight_WI.shape
        gate = torch.sigmoid(total)
        dtotal_TI = dy_TI * gate * (1 + total * (1 - gate))
        valid = padded.shape[0] - width + 1
        dtotal = dtotal_TI.new_zeros(valid, channels)
        dtotal[tokens - (width - 1)] = dtotal_TI
        dpadded = torch.zeros_like(padded)
        dweight = torch.empty_like(weight_WI)
        for k in range(width):
            dpadded[k : k + valid].addcmul_(dtotal, weight_WI[k])
            dweight[k] = (dtotal * padded[k : k + valid]).sum(0)
        dpadded.index_add_(0, tails, dtail.flatten(0, 1))
        dbias = dtotal_TI.sum(0) if ctx.biased else None
        return dpadded[tokens], dweight, dbias, dpadded[before].view_as(dtail), None


def conv(
    x_TI: Tensor, weight_IW: Tensor, bias_I: Tensor | None, segments: Segments, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal depth-wise convolution and SiLU: y_TI, and the last W-1 inputs of each sequence tail_SI(W-1), oldest
    first.

    `initial` [S, I, W-1]: the inputs before the first one; zeros if None.
    """
    channels, width = weight_IW.shape
    history = (
        x_TI.new_zeros(segments.count, width - 1, channels)
        if initial is None
        else initial.to(x_TI.dtype).transpose(1, 2)
    )
    if not segments.tokens:
        return torch.zeros_like(x_TI), history.transpose(1, 2)
    rows = _rows(segments.lengths, width - 1, x_TI.device)
    y_TI, tail = _Conv.apply(x_TI, weight_IW.t(), bias_I, history, rows)
    return y_TI, tail.transpose(1, 2)


def conv_step(x_SI: Tensor, weight_IW: Tensor, bias_I: Tensor | None, tail: Tensor, slots_S: Tensor) -> Tensor:
    """One token of each sequence: y_SI; `tail[slots]` [I, W-1] is advanced in place. No gradient."""
    window = torch.cat([tail[slots_S], x_SI[:, :, None]], dim=2)
    tail[slots_S] = window[:, :, 1:]
    total = (window * weight_IW).sum(-1)
    return F.silu(total if bias_I is None else total + bias_I)
