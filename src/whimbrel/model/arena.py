"""One piece of memory for all weights of a model on a CPU, in huge pages where the system has them.

Decoding reads every weight for every token; with pages of 4 KiB a twelfth of that time went into finding them
(2-core Xeon, 2026-11-21).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from whimbrel.ops.memory import HUGE, huge

LINE = 64


class Arena:
    """CPU memory that tensors are cut from; it lives as long as any of them."""

    def __init__(self, nbytes: int, tensors: int) -> None:
        """Room for `tensors` tensors of `nbytes` bytes together. Nothing is touched, so nothing is resident yet."""
        self.bytes = huge(torch.empty(nbytes + tensors * LINE + HUGE, dtype=torch.uint8))
        self.used = -self.bytes.data_ptr() % HUGE

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An unset tensor that begins on a cache line."""
        size = math.prod(shape) * dtype.itemsize
        piece = self.bytes[self.used : self.used + size].view(dtype).view(*shape)
        self.used += -(-size // LINE) * LINE
        return piece
