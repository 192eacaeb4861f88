"""The native convolution, norms and squared ReLU (native/src/conv.cpp, gated_norm.cpp), one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from whimbrel.ops.cpu.library import address, by_rows, call, fits, structure
from whimbrel.ops.memory import fresh
from whimbrel.ops.segments import Segments
from whimbrel.ops.torch import convolution, norm

_Conv = structure("Conv", "x weight bias initial y tail offsets", "sequences channels width x_stride")
ConvGradients = structure("ConvGradients", "dy dtail dx dweight dbias dinitial", "dx_stride")
WIDEST = 64
"""Taps of a convolution that the library takes."""
_Norm = structure("GatedNorm", "y gate weight out scale", "tokens groups width gate_stride", "eps")
NormGradients = structure("GatedNormGradients", "dout dy dgate dweight", "dgate_stride")
Relu2 = structure("Relu2", "x dy out", "count squared")


class _NativeConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_IW: Tensor, bias_I: Tensor | None, initial: Tensor, starts: Tensor
    ) -> Any:
        x_TI = by_rows(x_TI)
        weight_WI, initial = weight_IW.t().contiguous(), initial.contiguous()
        y, tail = fresh(*x_TI.shape), torch.empty_like(initial)
        ctx.save_for_backward(x_TI, weight_WI, bias_I, initial, starts)
        call("conv_forward", describe_conv(x_TI, weight_WI, bias_I, initial, y, tail, starts))
        return y, tail

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x_TI, weight_WI, bias_I, initial, starts = ctx.saved_tensors
        dy, dtail = (g.contiguous() for g in gradients)
        dx, dweight, dbias, dinitial = (fresh(*v.shape) for v in (x_TI, weight_WI, weight_WI[0], initial))
        outputs = [address(v) for v in (dy, dtail, dx, dweight, dbias, dinitial)]
        described = describe_conv(x_TI, weight_WI, bias_I, initial, None, None, starts)
        call("conv_backward", described, ConvGradients(*outputs, dx.stride(0)))
        return dx, dweight.t(), None if bias_I is None else dbias, dinitial, None


def describe_conv(*row: Any) -> Any:
    """The C struct of a convolution: x, weight [W, I], bias, initial [S, W-1, I], y, tail as initial, starts."""
    x, weight, *_, starts = row
    return _Conv(*(address(v) for v in row), len(starts) - 1, x.shape[1], weight.shape[0], x.stride(0))


def conv(
    x_TI: Tensor, weight_IW: Tensor, bias_I: Tensor | None, segments: Segments, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `ops.torch.conv`, in float32 on a CPU."""
    if not segments.tokens or weight_IW.shape[1] > WIDEST or not fits(x_TI, weight_IW, bias_I, initial):
        return convolution.conv(x_TI, weight_IW, bias_I, segments, initial)
    channels, width = weight_IW.shape
    history = torch.zeros(segments.count, width - 1, channels) if initial is None else initial.transpose(1, 2)
    y_TI, tail = _NativeConv.apply(x_TI, weight_IW, bias_I, history, segments.starts)
    return y_TI, tail.transpose(1, 2)


class _NativeNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TD: Tensor, gate_TD: Tensor | None, weight_D: Tensor, groups: int, eps: float) -> Tensor:
        y_TD, weight_D = y_TD.contiguous(), weight_D.contiguous()
        gate_TD = gate_TD if gate_TD is None else by_rows(gate_TD)
        out, scale = fresh(*y_TD.shape), torch.empty(y_TD.shape[0], groups)
        call("gated_norm_forward", describe_norm(y_TD, gate_TD, weight_D, out, scale, eps))
        ctx.save_for_backward(y_TD, gate_TD, weight_D, scale)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        y_TD, gate_TD, weight_D, scale = ctx.saved_tensors
        dout = gradients[0].contiguous()
        dy, dgate = fresh(*y_TD.shape), None if gate_TD is None else fresh(*y_TD.shape)
        dweight = torch.zeros(torch.get_num_threads(), weight_D.shape[0])
        outputs = NormGradients(*(address(v) for v in (dout, dy, dgate, dweight)), dy.stride(0))
        call("gated_norm_backward", describe_norm(y_TD, gate_TD, weight_D, None, scale, ctx.eps), outputs)
        return dy, dgate, dweight.sum(0), None, None


def describe_norm(y: Tensor, gate: Tensor | None, weight: Tensor, out: Tensor | None, scale: Tensor, eps: float) -> Any:
    """The C struct of a gated norm; scale [T, groups]."""
    sizes = (*scale.shape, y.shape[1] // scale.shape[1], 0 if gate is None else gate.stride(0))
    return _Norm(*(address(v) for v in (y, gate, weight, out, scale)), *sizes, eps)


def gated_norm(y_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """As `ops.torch.gated_norm`, in float32 on a CPU."""
    if y_TD.dim() != 2 or not fits(y_TD, gate_TD, weight_D):
        return norm.gated_norm(y_TD, gate_TD, weight_D, groups, eps)
    return _NativeNorm.apply(y_TD, gate_TD, weight_D, groups, eps)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `ops.torch.rms_norm`, in float32 on a CPU."""
    if not fits(x_TD, weight_D):
        return norm.rms_norm(x_TD, weight_D, eps)
    flat = x_TD if x_TD.dim() == 2 else x_TD.reshape(-1, x_TD.shape[-1])
    return _NativeNorm.apply(flat, None, weight_D, 1, eps).view(x_TD.shape)


class _NativeRelu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = fresh(*x.shape)
        call("relu2", Relu2(address(x), None, address(out), x.numel()))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        dy, dx = gradients[0].contiguous(), fresh(*x.shape)
        call("relu2", Relu2(address(x), address(dy), address(dx), x.numel()))
        return dx


def relu2(x: Tensor) -> Tensor:
    """As `ops.torch.relu2`, in float32 on a CPU."""
    return _NativeRelu2.apply(x) if fits(x) else norm.relu2(x)
