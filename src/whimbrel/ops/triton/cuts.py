"""How packed tokens are cut into the blocks that programs take: never across two sequences. Kept by layout and device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Cuts:
    """n pieces of at most so many tokens, in order; together they are all T tokens. S sequences, K tokens kept."""

    begins: Tensor
    """[n+1] int32: the first token of each piece, and T."""
    sequence: Tensor
    """[n] int32: the sequence of each piece."""
    starts: Tensor
    """[S+1] int32: the first token of each sequence, and T."""
    first: Tensor
    """[S+1] int32: the first piece of each sequence, and n."""
    rows: Tensor
    """[n] int32: where the state after the piece is wanted: S states after sequences, then K after tokens; else -1."""
    chunks: Tensor
    """[n+1] int32: the first chunk of each piece, and their number m."""
    chunk_begins: Tensor
    """[m] int32: the first token of each chunk."""
    chunk_ends: Tensor
    """[m] int32."""
    pieces: int
    count: int
    kept: tuple[int, ...]
    """Row of the state after each token asked for."""
    empty: tuple[int, ...]
    """Sequences without a token."""
    single: bool
    """Is every sequence that has tokens one piece?"""


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve training too, whoever asks first
def cut(lengths: tuple[int, ...], keep: tuple[int, ...], piece: int, chunk: int, device: torch.device) -> Cuts:
    """Pieces of at most `piece` tokens that end with each kept token, each in chunks of at most `chunk`."""
    begins: list[int] = []
    sequence, rows, starts, first = [], [], [0], [0]
    at, unique = 0, sorted(set(keep))
    held = {token: len(lengths) + place for place, token in enumerate(unique)}
    for s, length in enumerate(lengths):
        end = at + length
        ends = sorted({*range(at + piece, end, piece), *(k + 1 for k in unique if at <= k < end), end} - {at})
        for stop in ends:
            begins.append(at)
            sequence.append(s)
            rows.append(s if stop == end else held.get(stop - 1, -1))
            at = stop
        if length:
            held |= {end - 1: s} if end - 1 in held else {}
        starts.append(at)
        first.append(len(begins))
    begins.append(at)
    spans = [(i, min(i + chunk, stop)) for begin, stop in pairwise(begins) for i in range(begin, stop, chunk)]
    chunks = [0]
    for begin, stop in pairwise(begins):
        chunks.append(chunks[-1] - (begin - stop) // chunk)
    lists = (begins, sequence, starts, first, rows, chunks, [a for a, _ in spans], [b for _, b in spans])
    flat = torch.tensor([value for values in lists for value in values], dtype=torch.int32)
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([len(values) for values in lists])
    empty = tuple(s for s, length in enumerate(lengths) if not length)
    single = len(begins) - 1 == len(lengths) - len(empty)
    counted: Any = (len(begins) - 1, len(spans), tuple(held[k] for k in keep), empty, single)
    return Cuts(*(*parts, *counted))
