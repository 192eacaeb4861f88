"""How the native library is told of a weight matrix (`Matrix` and `Projection` in native/src/whimbrel.h)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from whimbrel.ops.cpu.library import address
from whimbrel.ops.packed import Packed

KINDS = {16: 1, 8: 2, 4: 3}


class Matrix(ctypes.Structure):
    """A weight matrix in one of four forms; all zeros where there is none."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("group", ctypes.c_int64),
    )

    @classmethod
    def of(cls, weight: Tensor | Packed | None) -> Matrix:
        """Describe a contiguous float32 tensor or a packed matrix on the CPU, which must outlive this."""
        if weight is None:
            return cls()
        if isinstance(weight, Packed):
            return cls(address(weight.codes), address(weight.scales), *weight.shape, KINDS[weight.bits], weight.group)
        return cls(address(weight), None, *weight.shape, 0, 0)


class Projection(ctypes.Structure):
    """A matrix and its bias."""

    _fields_ = (("matrix", Matrix), ("bias", ctypes.c_void_p))


def readable(weight: Tensor | Packed) -> bool:
    """Can the library read this matrix where it lies?"""
    if not isinstance(weight, Packed):
        return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.is_contiguous()
    if weight.form != "panels":
        return False
    parts = [weight.codes] if weight.scales is None else [weight.codes, weight.scales]
    return all(part.device.type == "cpu" and part.is_contiguous() for part in parts)
