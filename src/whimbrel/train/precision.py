"""Linear layers that multiply in FP8, forward and backward, over master weights of more bits; no Transformer Engine.

Three recipes, as published: `tensorwise`, one scale a tensor from its present largest value, E4M3 forward and E5M2 for
gradients (Nemotron-H, arXiv 2504.03624, section 2.4); `rowwise`, a power of two for each row, E4M3; `blockwise`, 1 x
128 for activations and gradients and 128 x 128 for weights, E4M3 (Nano 2, arXiv 2508.14444), the last block filled up
with zeros. The first and last layers stay as they are, and every layer with a side below 128 or no multiple of 16.

Products run in `torch._scaled_mm` where the device has the mode, else their operands are widened and multiplied (the
same numbers). What CUDA asks of layout and alignment is asserted everywhere: a CPU would take more. T tokens, I inputs,
O outputs; every operand is [rows, K] with the summed dim K last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whimbrel import ops
from whimbrel.errors import UserError, nearest
from whimbrel.model.linear import Linear

RECIPES = ("none", "tensorwise", "rowwise", "blockwise")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK = 128
LEAST = 1e-12
"""Of a largest value: a tensor of zeros has a scale too."""


@dataclass(frozen=True)
class Fp8:
    """Which linear layers multiply in 8 bits."""

    recipe: str = "none"
    """`tensorwise`, `rowwise`, `blockwise`, or `none`."""
    ends: int = 4
    """Layers at either end of the network that stay as they are."""

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise UserError(
                f"train.fp8.recipe is {self.recipe!r}; {nearest(self.recipe, RECIPES)}; "
                "set train.fp8.recipe to tensorwise"
            )
        if self.ends < 0:
            raise UserError(f"train.fp8.ends is {self.ends}; set train.fp8.ends to 0 or more, for example 4")


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


def quantise(x: Tensor, kind: str, dtype: torch.dtype = E4M3) -> Scaled:
    """Round [rows, K] to 8 bits with scales of a kind: `tensor`, `row` (powers of two), `block` or `square`."""
    most = torch.finfo(dtype).max
    kernels = _kernels(x)
    if kind == "tensor":
        scale = torch.linalg.vector_norm(x, torch.inf).float().clamp(min=LEAST) / most
        if kernels is not None:
            return Scaled(kernels.by_tensor(x, scale, dtype=dtype), scale, kind)
        return Scaled(_cast(x.float() / scale, dtype), scale, kind)
    if kind == "row":
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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, recipe: str) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.recipe = recipe
        left, right = {"tensorwise": ("tensor", "tensor"), "rowwise": ("row", "row")}.get(recipe, ("block", "square"))
        return product(quantise(x_TI, left), quantise(weight_OI, right), x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI = ctx.saved_tensors
        recipe, dy_TO = ctx.recipe, gradients[0].contiguous()
        if recipe == "tensorwise":
            # One scale for all: the transposed operands are the same codes the other way round.
            dy, weight, x = quantise(dy_TO, "tensor", E5M2), quantise(weight_OI, "tensor"), quantise(x_TI, "tensor")
            dx_TI = product(dy, _turned(weight), x_TI.dtype)
            dweight_OI = product(_turned(dy), _turned(x), weight_OI.dtype)
            return dx_TI, dweight_OI, None
        left, right = ("row", "row") if recipe == "rowwise" else ("block", "square")
        weight_IO, dy_OT, x_IT = (v.t().contiguous() for v in (weight_OI, dy_TO, _filled(x_TI)))
        dx_TI = product(quantise(dy_TO, left), quantise(weight_IO, right), x_TI.dtype)
        dy_OT = F.pad(dy_OT, (0, x_IT.shape[1] - dy_OT.shape[1]))
        return dx_TI, product(quantise(dy_OT, left), quantise(x_IT, left), weight_OI.dtype), None


def _turned(v: Scaled) -> Scaled:
    """[rows, K] -> [K, rows], the rows filled up with zeros to a multiple of 16, since they are summed now."""
    return Scaled(_filled(v.codes.view(torch.uint8)).t().contiguous().view(v.codes.dtype), v.scale, v.kind)


def _filled(x: Tensor) -> Tensor:
    """Rows of zeros at the end, up to a multiple of 16."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % 16)) if x.shape[0] % 16 else x


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, recipe: str) -> Tensor:
    """x Wᵀ + bias with products in FP8, forward and backward. Under autocast in its dtype, else in that of x."""
    if torch.is_autocast_enabled(x_TI.device.type):
        dtype = torch.get_autocast_dtype(x_TI.device.type)
        x_TI, weight_OI = x_TI.to(dtype), weight_OI.to(dtype)
        bias_O = None if bias_O is None else bias_O.to(dtype)
    y_TO = _Linear.apply(x_TI.contiguous(), weight_OI.contiguous(), recipe)
    return y_TO if bias_O is None else y_TO + bias_O


def suitable(module: nn.Module) -> bool:
    """Is it a linear layer whose sides are at least 128 and multiples of 16?"""
    if not isinstance(module, nn.Linear) or type(module) not in (nn.Linear, Linear):
        return False
    return all(side >= BLOCK and side % 16 == 0 for side in (module.in_features, module.out_features))


def chosen(model: Any, settings: Fp8) -> dict[str, nn.Linear]:
    """The linear layers that multiply in FP8, by name: those in the inner layers that are `suitable`."""
    if settings.recipe == "none":
        return {}
    inner = range(settings.ends, model.config.layers - settings.ends)
    found = ((f"layers.{i}.{n}", m) for i in inner for n, m in model.layers[i].named_modules())
    return {name: module for name, module in found if isinstance(module, nn.Linear) and suitable(module)}


@contextmanager
def converted(model: Any, settings: Fp8) -> Iterator[list[str]]:
    """Inside the block the chosen layers multiply in FP8 while gradients are taken; names of parameters do not change.

    Without gradients (evaluation) they multiply as ever. Raises `UserError` if no layer is suitable.
    """
    layers = chosen(model, settings)
    if settings.recipe != "none" and not layers:
        raise UserError(
            f"train.fp8.recipe is {settings.recipe!r}, but no layer between the first and last {settings.ends} has "
            f"sides of at least {BLOCK} that are multiples of 16; set train.fp8.recipe to none, or train.fp8.ends lower"
        )
    for module in layers.values():
        module.forward = _forward(module, settings.recipe)  # type: ignore[method-assign]
    try:
        yield list(layers)
    finally:
        for module in layers.values():
            del module.forward


def _forward(module: nn.Linear, recipe: str) -> Any:
    def forward(x_TI: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return ops.linear(x_TI, module.weight, module.bias)
        return linear(x_TI, module.weight, module.bias, recipe)

    return forward
