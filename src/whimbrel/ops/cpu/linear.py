"""The native matrix product for a few rows (native/src/rows.cpp): decoding reads every weight for little work."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from whimbrel.ops.cpu.library import address, call, fits
from whimbrel.ops.cpu.matrix import Matrix, Projection, readable
from whimbrel.ops.packed import Packed
from whimbrel.ops.torch import norm

FEW = 16
"""Rows up to which reading the weights costs about as much as the arithmetic."""


class _Linear(ctypes.Structure):
    _fields_ = (("weight", Projection), ("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("rows", ctypes.c_int64))


def linear(x_TD: Tensor, weight_OD: Tensor | Packed, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias: [T, O]. Native for at most 16 rows without gradient, in float32 on a CPU; else torch's.

    With weights of 8 or 4 bits the activations are rounded too: to 255 steps of a row and 32 inputs.
    """
    few = x_TD.dim() == 2 and 0 < x_TD.shape[0] <= FEW and not torch.is_grad_enabled()
    if not few or not fits(x_TD, bias_O) or not readable(weight_OD):
        return norm.linear(x_TD, weight_OD, bias_O)
    x_TD = x_TD.contiguous()
    y_TO = torch.empty(x_TD.shape[0], weight_OD.shape[0])
    weight = Projection(Matrix.of(weight_OD), address(bias_O))
    call("linear", _Linear(weight, address(x_TD), address(y_TO), x_TD.shape[0]))
    return y_TO
