"""The native scan (native/src/scan.cpp): the plain recurrence in the first-level cache, its gradients written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from whimbrel.ops.cpu.library import address, call, fits, structure
from whimbrel.ops.memory import fresh
from whimbrel.ops.segments import Segments
from whimbrel.ops.torch import scan as vectorised

_Scan = structure(
    "Scan",
    "x dt a b c d initial y final offsets",
    "sequences heads width groups size x_stride b_stride c_stride",
)
_Gradients = structure("ScanGradients", "dy dfinal dx ddt da db dc dd dinitial", "")


def _rows(x: Tensor) -> Tensor:
    """A tensor whose tokens may lie apart, but whose numbers within a token are neighbours."""
    dense = x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]
    return x if dense else x.contiguous()


def _describe(row: Sequence[Tensor | None], y: Tensor, final: Tensor, offsets: Tensor) -> Any:
    x, dt, a, b, c, d, initial = row
    assert x is not None and b is not None and c is not None
    pointers = [address(v) for v in (x, dt, a, b, c, d, initial, y, final, offsets)]
    shape = (len(offsets) - 1, x.shape[1], x.shape[2], b.shape[1], b.shape[2])
    return _Scan(*pointers, *shape, x.stride(0), b.stride(0), c.stride(0))


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, *rest: Any) -> Any:
        initial, segments = rest
        heads, width, size = *x.shape[1:], b.shape[2]
        x, b, c = _rows(x), _rows(b), _rows(c)
        dt, a, d = dt.contiguous(), a.contiguous(), d.contiguous()
        initial = None if initial is None else initial.contiguous()
        y = fresh(*x.shape)
        final = torch.empty(segments.count, heads, width, size)
        call("scan_forward", _describe((x, dt, a, b, c, d, initial), y, final, segments.starts))
        ctx.save_for_backward(x, dt, a, b, c, d, initial, y)
        ctx.starts = segments.starts
        return y, final

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        *row, y = ctx.saved_tensors
        _, dt, a, b, c, _, initial = row
        dy, dfinal = (g.contiguous() for g in gradients)
        dx, ddt, dinitial = fresh(*y.shape), torch.empty_like(dt), torch.empty_like(dfinal)
        db, dc = fresh(*b.shape), fresh(*c.shape)
        da, dd = torch.empty(len(dfinal), len(a)), torch.empty(len(dfinal), len(a))
        outputs = [address(v) for v in (dy, dfinal, dx, ddt, da, db, dc, dd, dinitial)]
        call("scan_backward", _describe(row, y, dfinal, ctx.starts), _Gradients(*outputs))
        return dx, ddt, da.sum(0), db, dc, dd.sum(0), None if initial is None else dinitial, None


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
    """As `ops.torch.ssd`, in float32 on a CPU; other dtypes, devices and states at chosen tokens are left to it."""
    row = (x_THP, dt_TH, a_H, b_TGN, c_TGN, d_H)
    if keep or not segments.tokens or not fits(*row, initial_SHPN):
        return vectorised.ssd(*row, segments, initial_SHPN, keep)
    y_THP, final_SHPN = _Native.apply(*row, initial_SHPN, segments)
    return y_THP, final_SHPN, final_SHPN[:0]
