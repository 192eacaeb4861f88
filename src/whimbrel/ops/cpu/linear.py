"""The native matrix products: of a few rows (native/src/rows.cpp), where decoding reads every weight for little work,
and of many rows with packed weights (native/src/gemm.cpp), which need not be unpacked first.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from whimbrel.ops.cpu.library import address, call, fits, isa
from whimbrel.ops.cpu.matmul import large
from whimbrel.ops.cpu.matrix import Matrix, Projection, readable
from whimbrel.ops.packed import Packed
from whimbrel.ops.torch import norm

FEW = 16
"""Rows up to which reading the weights costs about as much as the arithmetic."""


class _Linear(ctypes.Structure):
    _fields_ = (("weight", Projection), ("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("rows", ctypes.c_int64))


class _Gemm(ctypes.Structure):
    _fields_ = (
        ("weight", Projection),
        *((name, ctypes.c_void_p) for name in ("x", "norm", "norm_bias", "gate", "residual", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "x_stride", "gate_stride", "groups", "act")),
        ("eps", ctypes.c_float),
    )


def linear(x_TD: Tensor, weight_OD: Tensor | Packed, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias: [T, O]. Native in float32 on a CPU: large products, and without gradients at most 16 rows or a
    packed matrix, for 8 or 4 bits with activations rounded too, to 255 steps of a row and 32 inputs; else torch's.
    """
    if isinstance(weight_OD, Tensor) and x_TD.dim() == 2 and x_TD.shape[0] > FEW and fits(x_TD, weight_OD, bias_O):
        native = large(x_TD, weight_OD, bias_O)
        return norm.linear(x_TD, weight_OD, bias_O) if native is None else native
    rows = x_TD.shape[0] if x_TD.dim() == 2 and not torch.is_grad_enabled() else 0
    here = 0 < rows <= FEW or (rows and isinstance(weight_OD, Packed) and isa() != "baseline")
    if not here or not fits(x_TD, bias_O) or not readable(weight_OD):
        return norm.linear(x_TD, weight_OD, bias_O)
    x_TD = x_TD.contiguous()
    y_TO = torch.empty(rows, weight_OD.shape[0])
    weight = Projection(Matrix.of(weight_OD), address(bias_O))
    if rows <= FEW:
        call("linear", _Linear(weight, address(x_TD), address(y_TO), rows))
    else:
        call("gemm", _Gemm(weight=weight, x=address(x_TD), y=address(y_TO), rows=rows, x_stride=x_TD.shape[1]))
    return y_TO


def linear_relu2(x_TD: Tensor, weight_FD: Tensor) -> Tensor | None:
    """relu(x W^T)^2 [T, F]; None: not for the library, which takes large products in float32 on a CPU."""
    return large(x_TD, weight_FD, None, True) if fits(x_TD, weight_FD) else None
