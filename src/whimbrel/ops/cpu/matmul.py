"""The native products of training (native/src/matmul.cpp): of float32 matrices of many rows, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from whimbrel.ops.cpu.library import address, call, structure

_Matmul = structure("Matmul", "a b c", "rows columns depth a_row a_step b_step b_column c_row add")


def lies(x: Tensor) -> bool:
    """Are the numbers of a row, or of a column, neighbours?"""
    return 1 in x.stride()


def product(a_RK: Tensor, b_KN: Tensor, out_RN: Tensor, add: bool = False) -> Tensor:
    """a b into `out`, or added to it; a and b by rows or turned, rows of `out` of neighbours."""
    (rows, depth), columns = a_RK.shape, b_KN.shape[1]
    strides = (*a_RK.stride(), *b_KN.stride(), out_RN.stride(0))
    call("matmul", _Matmul(address(a_RK), address(b_KN), address(out_RN), rows, columns, depth, *strides, add))
    return out_RN
