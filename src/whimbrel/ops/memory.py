"""Huge pages for large tensors on a CPU: fewer first touches, and fewer look-ups while memory is streamed."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

HUGE = 2 << 20
"""Bytes of a huge page."""
_PAGE = 4096
_MADV_HUGEPAGE = 14


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)


def huge(tensor: Tensor) -> Tensor:
    """Ask that an untouched CPU tensor be laid in huge pages, and give it back.

    It is advice: systems without them (and tensors of less than two) go on as before.
    """
    if sys.platform == "linux" and tensor.device.type == "cpu" and tensor.nbytes >= 2 * HUGE:
        begin = -(-tensor.data_ptr() // _PAGE) * _PAGE
        length = (tensor.data_ptr() + tensor.nbytes - begin) // _PAGE * _PAGE
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return tensor


def settled(tensor: Tensor) -> Tensor:
    """A CPU tensor copied to huge pages if it is large; else itself."""
    large = tensor.device.type == "cpu" and tensor.nbytes >= 2 * HUGE
    return huge(torch.empty(tensor.shape, dtype=tensor.dtype)).copy_(tensor) if large else tensor


def fresh(*shape: int) -> Tensor:
    """An unset float32 tensor on the CPU, in huge pages if it is large."""
    return huge(torch.empty(*shape))
