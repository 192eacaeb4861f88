"""Numbers of 8 bits: rounding to E4M3 and E5M2 with scales of four kinds, products of them, and weights for decoding.

Products run in `torch._scaled_mm` where the device has the mode, else their operands are widened and multiplied (the
same numbers). What CUDA asks of layout and alignment is asserted everywhere: a CPU would take more. Every operand is
[rows, K] with the summed dim K last; T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from whimbrel.ops.packed import SIDE, Packed

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK = 128
LEAST = 1e-12
"""Of a largest value: a tensor of zeros has a scale too."""


@dataclass(frozen=True)
class Scaled:
    """An operand: codes [rows, K] times their scales."""

    codes: Tensor
    scale: Tensor
    """[] of the tensor, [rows, 1] of rows, [rows, K/128] of 1 x 128 blocks, or [rows/128, K/128] of square ones."""
    kind: str

    def wide(self) -> Tensor:
        """The numbers, in float32."""
        rows, width = self.codes.shape
        scale = self.scale
        if self.kind in ("block", "square"):
            scale = scale.repeat_interleave(BLOCK, 1)[:, :width]
        if self.kind == "square":
            scale = scale.repeat_interleave(BLOCK, 0)[:rows]
        return self.codes.float() * scale


def quantise(x: Tensor, kind: str, dtype: torch.dtype = E4M3, squared: bool = False) -> Scaled:
    """Round [rows, K] to 8 bits with scales of a kind: `tensor`, `row` (powers of two), `block` or `square`.

    `squared`: round max(x, 0)^2 instead, which a GPU does in the same pass for tensors and blocks in E4M3.
    """
    most = torch.finfo(dtype).max
    kernels = _kernels(x)
    if squared and kernels is not None and kind in ("tensor", "block") and dtype == E4M3:
        if kind == "block":
            codes, scale = kernels.by_blocks(x, relu2=True)
        else:
            codes = kernels.by_tensor(x, scale := kernels.relu2_scale(x), relu2=True)
        return Scaled(codes, scale, kind)
    x = F.relu(x).square() if squared else x
    if kind == "tensor":
        scale = torch.linalg.vector_norm(x, torch.inf).float().clamp(min=LEAST) / most
        if kernels is not None:
            return Scaled(kernels.by_tensor(x, scale, dtype=dtype), scale, kind)
        return Scaled(_cast(x.float() / scale, dtype), scale, kind)
    if kind == "row":
        if kernels is not None and dtype == E4M3:
            codes, scale = kernels.by_rows(x)
            return Scaled(codes, scale, kind)
        scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(1, keepdim=True).float().clamp(min=LEAST) / most)))
        return Scaled(_cast(x.float() / scale, dtype), scale, kind)
    if kind == "block" and kernels is not None and dtype == E4M3:
        codes, scale = kernels.by_blocks(x)
        return Scaled(codes, scale, kind)
    rows, width = x.shape
    high = BLOCK if kind == "square" else 1
    padded = F.pad(x.float(), (0, -width % BLOCK, 0, -rows % high)).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, high))
    scale = padded.abs().amax((1, 3)).clamp(min=LEAST) / most
    codes = (padded / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :width]
    return Scaled(_cast(codes, dtype).contiguous(), scale.t().contiguous().t() if kind == "block" else scale, kind)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Clamped first: E5M2 would overflow to infinity."""
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


def _kernels(x: Tensor) -> Any:
    from whimbrel import ops

    if not x.is_cuda or ops.gpu()[0] is None or x.stride(-1) != 1:
        return None
    from whimbrel.ops.triton import quantise as kernels

    return kernels


def check_layout(a: Scaled, b: Scaled) -> None:
    """Assert what CUDA's scaled product asks of a [M, K] and b [N, K] for a bᵀ."""
    (rows, width), (columns, width_b) = a.codes.shape, b.codes.shape
    assert width == width_b, f"{width} numbers are summed on one side and {width_b} on the other"
    assert a.codes.is_contiguous() and b.codes.is_contiguous(), "codes lie row by row, the summed numbers side by side"
    assert width % 16 == 0, f"{width} summed numbers are not a multiple of 16"
    assert columns % 16 == 0, f"{columns} columns of the result are not a multiple of 16"
    assert E4M3 in (a.codes.dtype, b.codes.dtype), "one side at least is E4M3"
    assert a.scale.dtype == b.scale.dtype == torch.float32, "scales are float32"
    kinds = (a.kind, b.kind)
    assert kinds in (("tensor", "tensor"), ("row", "row"), ("block", "square"), ("block", "block")), (
        f"no mode for {kinds}"
    )
    blocks = -(-width // BLOCK)
    for side, count in ((a, rows), (b, columns)):
        sizes: dict[str, tuple[int, ...]] = {"tensor": (), "row": (count, 1), "block": (count, blocks)}
        assert side.scale.shape == sizes.get(side.kind, (-(-count // BLOCK), blocks)), f"scales are {side.scale.shape}"
        if side.kind == "block":
            assert side.scale.stride(0) == 1 or count == 1, "scales of 1 x 128 blocks lie column by column"
            assert side.codes.dtype == E4M3, "blocks are E4M3"


@cache
def native(device: str, kind_a: str, kind_b: str, dtype_a: torch.dtype, dtype_b: torch.dtype) -> str:
    """Empty if the device multiplies these kinds itself, else what it says: asked once, with a small product."""
    x = torch.ones(2 * BLOCK, 2 * BLOCK, device=device)
    try:
        _scaled_mm(quantise(x, kind_a, dtype_a), quantise(x, kind_b, dtype_b), torch.bfloat16)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error).splitlines()[0] or type(error).__name__
    return ""


def _scaled_mm(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    scale_b = b.scale.t() if b.kind in ("row", "block", "square") else b.scale
    fast = a.kind != "block" and a.codes.dtype == b.codes.dtype == E4M3  # gradients are summed with full accuracy
    return torch._scaled_mm(
        a.codes, b.codes.t(), a.scale, scale_b, out_dtype=dtype, use_fast_accum=fast and a.codes.is_cuda
    )


def product(a: Scaled, b: Scaled, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """a bᵀ [M, N] in `dtype`: native where the device can, else of the widened operands."""
    check_layout(a, b)
    if not native(str(a.codes.device), a.kind, b.kind, a.codes.dtype, b.codes.dtype):
        # Rowwise products come in bfloat16 alone.
        return _scaled_mm(a, b, torch.bfloat16 if a.kind != "tensor" else dtype).to(dtype)
    return (a.wide() @ b.wide().t()).to(dtype)


def weight(weight_OI: Tensor) -> Packed:
    """A matrix in the form `fp8` (`ops/packed.py`): a power of two for each row. I must be a multiple of 16."""
    outputs, inputs = weight_OI.shape
    rounded = quantise(F.pad(weight_OI, (0, 0, 0, -outputs % SIDE)), "row")
    return Packed(rounded.codes, rounded.scale, (outputs, inputs), 8, inputs, "fp8")


def linear(x_TI: Tensor, weight_OI: Packed, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias with a matrix in the form `fp8`; rows of x, whose dtype the result has, are rounded to E4M3 too."""
    assert weight_OI.form == "fp8" and weight_OI.scales is not None
    codes = Scaled(weight_OI.codes, weight_OI.scales, "row")
    flat = x_TI.reshape(-1, x_TI.shape[-1]).contiguous()
    y_TO = product(quantise(flat, "row"), codes, x_TI.dtype)[:, : weight_OI.shape[0]]
    return (y_TO if bias_O is None else y_TO + bias_O).view(*x_TI.shape[:-1], -1)
