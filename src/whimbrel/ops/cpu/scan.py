"""The native scan (native/src/scan.cpp): products of small matrices in the caches, its gradients written out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from whimbrel.ops.cpu.library import address, by_tokens, call, fits, structure
from whimbrel.ops.memory import fresh
from whimbrel.ops.segments import Segments
from whimbrel.ops.torch import scan as vectorised

PIECE = 256
"""Tokens from one state that is kept for the backward pass to the next."""

_Scan = structure(
    "Scan",
    "x dt a b c d initial y final kept saved pieces first slots",
    "sequences heads width groups size x_stride b_stride c_stride",
)
Gradients = structure("ScanGradients", "dy dfinal dkept dx ddt da db dc dd dinitial", "dx_stride db_stride dc_stride")


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve training too, whoever asks first
def cut(lengths: tuple[int, ...], keep: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Where pieces begin (and T); the first of each sequence (and their number); the row of `keep` each ends with, or
    -1.
    """
    begins, first, begin = [0], [0], 0
    for length in lengths:
        end = begin + length
        begins += sorted({*range(begin + PIECE, end, PIECE), *(k + 1 for k in keep if begin <= k < end), end} - {begin})
        first.append(len(begins) - 1)
        begin = end
    slots = [keep.index(end - 1) if end - 1 in keep else -1 for end in begins[1:]]
    return torch.tensor(begins), torch.tensor(first), torch.tensor(slots)


def describe(row: Sequence[Tensor | None], results: Sequence[Tensor | None], pieces: Sequence[Tensor]) -> Any:
    """The C struct of a scan: x … d and initial; y, final, kept and saved; what `cut` gives."""
    x, _, _, b, c, _, _ = row
    assert x is not None and b is not None and c is not None
    pointers = [address(v) for v in (*row, *results, *pieces)]
    shape = (len(pieces[1]) - 1, x.shape[1], x.shape[2], b.shape[1], b.shape[2])
    return _Scan(*pointers, *shape, x.stride(0), b.stride(0), c.stride(0))


def room(pieces: Sequence[Tensor], segments: Segments, state: Sequence[int]) -> Tensor | None:
    """For the states before pieces, if some sequence is of several."""
    several = len(pieces[2]) > sum(length > 0 for length in segments.lengths)
    return fresh(len(pieces[2]), *state) if several else None


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, *rest: Any) -> Any:
        initial, segments, keep, learn = rest
        state = (*x.shape[1:], b.shape[2])
        row = (by_tokens(x), dt.contiguous(), a.contiguous(), by_tokens(b), by_tokens(c), d.contiguous())
        initial = None if initial is None else initial.contiguous()
        pieces = cut(segments.lengths, keep)
        y, final, kept = fresh(*x.shape), torch.empty(segments.count, *state), torch.empty(len(keep), *state)
        saved = room(pieces, segments, state) if learn else None
        call("scan_forward", describe((*row, initial), (y, final, kept, saved), pieces))
        ctx.save_for_backward(*row, initial, saved)
        ctx.pieces, ctx.state = pieces, (segments.count, *state)
        ctx.set_materialize_grads(False)
        return y, final, kept

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        *row, saved = ctx.saved_tensors
        x, dt, a, b, c, _, initial = row
        dy, dfinal, dkept = (None if g is None else g.contiguous() for g in gradients)
        dy = torch.zeros(x.shape) if dy is None else dy
        dx, ddt, db, dc = fresh(*x.shape), torch.empty_like(dt), fresh(*b.shape), fresh(*c.shape)
        da, dd = torch.empty(ctx.state[0], len(a)), torch.empty(ctx.state[0], len(a))
        dinitial = None if initial is None else torch.empty(ctx.state)
        outputs = [address(v) for v in (dy, dfinal, dkept, dx, ddt, da, db, dc, dd, dinitial)]
        strides = (dx.stride(0), db.stride(0), dc.stride(0))
        call("scan_backward", describe(row, (None, None, None, saved), ctx.pieces), Gradients(*outputs, *strides))
        return dx, ddt, da.sum(0), db, dc, dd.sum(0), dinitial, None, None, None


def ssd(
    x_THP: Tensor,
    dt_TH: Tensor,
    a_H: Tensor,
    b_TGN: Tensor,
    c_TGN: Tensor,
    d_H: Tensor,
    segments: Segments,
    initial_SHPN: Tensor | None = None,
    keep: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.torch.ssd`, in float32 on a CPU; other dtypes and devices are left to it."""
    row = (x_THP, dt_TH, a_H, b_TGN, c_TGN, d_H)
    if not segments.tokens or not fits(*row, initial_SHPN):
        return vectorised.ssd(*row, segments, initial_SHPN, keep)
    unique = tuple(dict.fromkeys(keep))
    y_THP, final_SHPN, kept = _Native.apply(*row, initial_SHPN, segments, unique, torch.is_grad_enabled())
    return y_THP, final_SHPN, kept if len(unique) == len(keep) else kept[[unique.index(k) for k in keep]]
