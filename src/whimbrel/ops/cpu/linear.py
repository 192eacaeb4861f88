"""The native matrix product for a few rows (native/src/linear.cpp): decoding reads every weight for little work."""

from __future__ import annotations

import torch
from torch import Tensor

from whimbrel.ops.cpu.library import address, call, fits, structure
from whimbrel.ops.packed import Packed
from whimbrel.ops.torch import norm

FEW = 8
"""Rows up to which reading the weights costs more than the arithmetic."""

_Linear = structure("Linear", "x weight bias y", "rows inputs outputs")


def linear(x_TD: Tensor, weight_OD: Tensor | Packed, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias: [T, O]. Native for at most 8 rows without gradient, in float32 on a CPU; else torch's."""
    few = x_TD.dim() == 2 and 0 < x_TD.shape[0] <= FEW and not torch.is_grad_enabled()
    if isinstance(weight_OD, Packed) or not few or not weight_OD.is_contiguous() or not fits(x_TD, weight_OD, bias_O):
        return norm.linear(x_TD, weight_OD, bias_O)
    x_TD = x_TD.contiguous()
    y_TO = torch.empty(x_TD.shape[0], weight_OD.shape[0])
    call(
        "linear", _Linear(address(x_TD), address(weight_OD), address(bias_O), address(y_TO), *x_TD.shape, y_TO.shape[1])
    )
    return y_TO
