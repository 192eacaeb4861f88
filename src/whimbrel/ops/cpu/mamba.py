"""A Mamba-2 layer between its projections, in training: convolution, scan and gated norm as one step of autograd, whose
gradients go straight to their columns of [z | x | B | C | dt]. Apart, each slice is a node, and its gradient a copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from whimbrel.ops.cpu import pointwise, scan
from whimbrel.ops.cpu.library import address, by_rows, call, fits
from whimbrel.ops.memory import fresh
from whimbrel.ops.segments import Segments
from whimbrel.ops.torch.mamba import heads, parts


def _scan_row(mixed_TI: Tensor, dt_TH: Tensor, a_H: Tensor, d_H: Tensor, inner: int, groups: int) -> tuple[Any, ...]:
    """What a scan takes, as slices of the convolution's output or of its gradient."""
    x, b, c = heads(mixed_TI, len(a_H), inner, groups)
    return x, dt_TH, a_H, b, c, d_H, None


class _Mamba(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_TK: Tensor, *rest: Any) -> Tensor:
        conv_IW, conv_bias_I, dt_bias_H, a_H, d_H, norm_D, segments, groups, eps, limit, learn = rest
        z_TK, a_H, d_H, norm_D = by_rows(z_TK), a_H.contiguous(), d_H.contiguous(), norm_D.contiguous()
        gate_TD, before_TI, dt_raw_TH = parts(z_TK, conv_IW, norm_D)
        tokens, inner = len(z_TK), len(norm_D)
        weight_WI, mixed_TI = conv_IW.t().contiguous(), fresh(*before_TI.shape)
        history = torch.zeros(segments.count, len(weight_WI) - 1, len(conv_IW))
        tail = torch.empty_like(history)
        row = (before_TI, weight_WI, conv_bias_I, history, mixed_TI, tail, segments.starts)
        call("conv_forward", pointwise.describe_conv(*row))

        dt_TH = F.softplus(dt_raw_TH + dt_bias_H).clamp_(*limit)
        scanned = _scan_row(mixed_TI, dt_TH, a_H, d_H, inner, groups)
        state, pieces = (len(a_H), inner // len(a_H), scanned[3].shape[2]), scan.cut(segments.lengths, ())
        saved = scan.room(pieces, segments, state) if learn else None
        y_TD, final = fresh(tokens, inner), torch.empty(segments.count, *state)
        call("scan_forward", scan.describe(scanned, (y_TD, final, None, saved), pieces))

        out_TD, scale = fresh(tokens, inner), torch.empty(tokens, groups)
        call("gated_norm_forward", pointwise.describe_norm(y_TD, gate_TD, norm_D, out_TD, scale, eps))
        if learn:
            kept = (z_TK, weight_WI, conv_bias_I, dt_bias_H, a_H, d_H, norm_D, mixed_TI, dt_TH, y_TD, scale, saved)
            ctx.save_for_backward(*kept)
            ctx.rest = (segments, pieces, groups, eps, limit)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        z_TK, weight_WI, conv_bias_I, dt_bias_H, a_H, d_H, norm_D, mixed_TI, dt_TH, y_TD, scale, saved = (
            ctx.saved_tensors
        )
        segments, pieces, groups, eps, limit = ctx.rest
        gate_TD, before_TI, dt_raw_TH = parts(z_TK, weight_WI.t(), norm_D)
        dz_TK, dout_TD = fresh(*z_TK.shape), gradients[0].contiguous()
        dgate_TD, dbefore_TI, ddt_raw_TH = parts(dz_TK, weight_WI.t(), norm_D)

        dy_TD, dnorm = fresh(*y_TD.shape), torch.zeros(torch.get_num_threads(), len(norm_D))
        found = [address(v) for v in (dout_TD, dy_TD, dgate_TD, dnorm)]
        described = pointwise.describe_norm(y_TD, gate_TD, norm_D, None, scale, eps)
        call("gated_norm_backward", described, pointwise.NormGradients(*found, dz_TK.stride(0)))

        row = _scan_row(mixed_TI, dt_TH, a_H, d_H, len(norm_D), groups)
        dmixed_TI, ddt_TH = fresh(*mixed_TI.shape), torch.empty_like(dt_TH)
        dx, _, _, db, dc, _, _ = _scan_row(dmixed_TI, dt_TH, a_H, d_H, len(norm_D), groups)
        da, dd = torch.empty(segments.count, len(a_H)), torch.empty(segments.count, len(a_H))
        found = [address(v) for v in (dy_TD, None, None, dx, ddt_TH, da, db, dc, dd, None)]
        strides = [len(dmixed_TI[0])] * 3
        call("scan_backward", scan.describe(row, (None, None, None, saved), pieces), scan.Gradients(*found, *strides))

        history = torch.zeros(segments.count, len(weight_WI) - 1, weight_WI.shape[1])
        dweight_WI, dbias_I, dhistory = fresh(*weight_WI.shape), fresh(weight_WI.shape[1]), torch.empty_like(history)
        found = [address(v) for v in (dmixed_TI, None, dbefore_TI, dweight_WI, dbias_I, dhistory)]
        described = pointwise.describe_conv(before_TI, weight_WI, conv_bias_I, history, None, None, segments.starts)
        call("conv_backward", described, pointwise.ConvGradients(*found, dz_TK.stride(0)))

        open_TH = dt_raw_TH + dt_bias_H
        if limit != (0.0, float("inf")):
            free_TH = F.softplus(open_TH)
            ddt_TH.masked_fill_((free_TH < limit[0]) | (free_TH > limit[1]), 0)
        dopen_TH = torch.ops.aten.softplus_backward(ddt_TH, open_TH, 1, 20)
        ddt_raw_TH.copy_(dopen_TH)
        bias = None if conv_bias_I is None else dbias_I
        own = (dz_TK, dweight_WI.t(), bias, dopen_TH.sum(0), da.sum(0), dd.sum(0), dnorm.sum(0))
        return *own, None, None, None, None, None


def mamba_layer(
    z_TK: Tensor,
    conv_IW: Tensor,
    conv_bias_I: Tensor | None,
    dt_bias_H: Tensor,
    a_H: Tensor,
    d_H: Tensor,
    norm_D: Tensor,
    segments: Segments,
    groups: int,
    eps: float,
    limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor | None:
    """[z | x | B | C | dt] -> RMSNorm(y silu(z)) [T, D]; None: not for the library, which takes float32 on the CPU."""
    row = (z_TK, conv_IW, conv_bias_I, dt_bias_H, a_H, d_H, norm_D)
    if not segments.tokens or conv_IW.shape[1] > pointwise.WIDEST or not fits(*row):
        return None
    return _Mamba.apply(*row, segments, groups, eps, limit, torch.is_grad_enabled())
