"""Huge pages for large tensors on a CPU: fewer first touches, and fewer look-ups while memory is streamed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    tensor = torch.empty(*shape)
    return tensor if _keeping else huge(tensor)  # inside `kept` the heap is marked already


_TRIM, _MAPPED = -1, -4
"""`mallopt`: how much free memory at the end of the heap is given back; how many blocks may be mapped by themselves."""
_keeping = False


@contextmanager
def kept() -> Iterator[None]:
    """Inside, memory that is freed stays with the process, in huge pages, and is given back to the system at the end.

    A training step frees what it took, gigabytes of it, and the next one takes it again: as pages of 4 KiB that was a
    fifth of a step (docs/train.md). Only glibc on Linux has these wishes; elsewhere nothing changes.
    """
    global _keeping
    if _keeping or sys.platform != "linux" or not hasattr(_libc(), "mallopt") or not hasattr(_libc(), "malloc_trim"):
        yield
        return
    _keeping = True
    _libc().mallopt(_MAPPED, 0)
    _libc().mallopt(_TRIM, -1)
    try:
        # The heap grows once, untouched, and is marked; what is taken from now on lies in the part that is marked.
        with suppress(RuntimeError):  # a system that promises no memory it may not have says no: then in small pages
            huge(torch.empty(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, dtype=torch.uint8))
        yield
    finally:
        _keeping = False
        _libc().mallopt(_MAPPED, 65536)
        _libc().mallopt(_TRIM, 128 << 10)
        _libc().malloc_trim(0)
