"""A cut of T packed tokens into S sequences, kept both as whole numbers and as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def put(values: Any, device: torch.device | str, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers of the host as a tensor on a device, without waiting for it: a GPU reads pinned memory."""
    here = torch.as_tensor(values, dtype=dtype)
    return (here.pin_memory() if torch.device(device).type == "cuda" else here).to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Segments:
    """Sequences laid end to end. The numbers live on the host, so that no operation waits for a device to know a
    shape.
    """

    lengths: tuple[int, ...]
    """Tokens of each sequence; a sequence may be empty."""
    device: torch.device

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        """Build from lengths."""
        assert all(n >= 0 for n in lengths), "lengths are 0 or more"
        return cls(tuple(lengths), torch.device(device))

    @property
    def count(self) -> int:
        """S."""
        return len(self.lengths)

    @cached_property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """[S+1] first token of each sequence, and T."""
        offsets = [0]
        for n in self.lengths:
            offsets.append(offsets[-1] + n)
        return tuple(offsets)

    @cached_property
    def starts(self) -> Tensor:
        """[S+1] int64: the offsets on the device."""
        return put(self.offsets, self.device)

    @cached_property
    def sequence_T(self) -> Tensor:
        """[T] int64: the sequence of each token."""
        lengths_S = put(self.lengths, self.device)
        return torch.repeat_interleave(torch.arange(self.count, device=self.device), lengths_S, output_size=self.tokens)

    @cached_property
    def place_T(self) -> Tensor:
        """[T] int64: the place of each token in its sequence."""
        return torch.arange(self.tokens, device=self.device) - self.starts[self.sequence_T]

    def rest(self, count: int) -> Segments:
        """The sequences after the first `count`, counted from token 0."""
        return self if count == 0 else Segments(self.lengths[count:], self.device)
