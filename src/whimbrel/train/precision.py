"""Linear layers that multiply in FP8, forward and backward, over master weights of more bits; no Transformer Engine.

Three recipes, as published: `tensorwise`, one scale a tensor from its present largest value, E4M3 forward and E5M2 for
gradients (Nemotron-H, arXiv 2504.03624, section 2.4); `rowwise`, a power of two for each row, E4M3; `blockwise`, 1 x
128 for activations and gradients and 128 x 128 for weights, E4M3 (Nano 2, arXiv 2508.14444), the last block filled up
with zeros. The first and last layers stay as they are, and every layer with a side below 128 or no multiple of 16.

Casts and products are those of `ops/fp8.py`. T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whimbrel import ops
from whimbrel.errors import UserError, nearest
from whimbrel.model.linear import Linear
from whimbrel.model.mlp import MLP
from whimbrel.ops.fp8 import BLOCK, E5M2, Scaled, product, quantise

RECIPES = ("none", "tensorwise", "rowwise", "blockwise")


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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, recipe: str, squared: bool) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.recipe, ctx.squared = recipe, squared
        left, right = {"tensorwise": ("tensor", "tensor"), "rowwise": ("row", "row")}.get(recipe, ("block", "square"))
        return product(quantise(x_TI, left, squared=squared), quantise(weight_OI, right), x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI = ctx.saved_tensors
        recipe, dy_TO = ctx.recipe, gradients[0].contiguous()
        if recipe == "tensorwise":
            # One scale for all: the transposed operands are the same codes the other way round.
            dy, weight = quantise(dy_TO, "tensor", E5M2), quantise(weight_OI, "tensor")
            x = quantise(x_TI, "tensor", squared=ctx.squared)
            dx_TI = product(dy, _turned(weight), x_TI.dtype)
            dweight_OI = product(_turned(dy), _turned(x), weight_OI.dtype)
            return _slope(dx_TI, x_TI, ctx.squared), dweight_OI, None, None
        left, right = ("row", "row") if recipe == "rowwise" else ("block", "square")
        open_TI = ops.relu2(x_TI) if ctx.squared else x_TI
        weight_IO, dy_OT, x_IT = (v.t().contiguous() for v in (weight_OI, dy_TO, _filled(open_TI)))
        dx_TI = product(quantise(dy_TO, left), quantise(weight_IO, right), x_TI.dtype)
        dy_OT = F.pad(dy_OT, (0, x_IT.shape[1] - dy_OT.shape[1]))
        dweight_OI = product(quantise(dy_OT, left), quantise(x_IT, left), weight_OI.dtype)
        return _slope(dx_TI, x_TI, ctx.squared), dweight_OI, None, None


def _slope(dx_TI: Tensor, x_TI: Tensor, squared: bool) -> Tensor:
    """The gradient of x where max(x, 0)^2 was multiplied."""
    return dx_TI.mul_(F.relu(x_TI).mul_(2)) if squared else dx_TI


def _turned(v: Scaled) -> Scaled:
    """[rows, K] -> [K, rows], the rows filled up with zeros to a multiple of 16, since they are summed now."""
    return Scaled(_filled(v.codes.view(torch.uint8)).t().contiguous().view(v.codes.dtype), v.scale, v.kind)


def _filled(x: Tensor) -> Tensor:
    """Rows of zeros at the end, up to a multiple of 16."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % 16)) if x.shape[0] % 16 else x


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, recipe: str, squared: bool = False) -> Tensor:
    """x Wᵀ + bias with products in FP8, forward and backward. Under autocast in its dtype, else in that of x.

    `squared`: of max(x, 0)^2, rounded as it is computed; x alone is kept for the gradient.
    """
    if torch.is_autocast_enabled(x_TI.device.type):
        dtype = torch.get_autocast_dtype(x_TI.device.type)
        x_TI, weight_OI = x_TI.to(dtype), weight_OI.to(dtype)
        bias_O = None if bias_O is None else bias_O.to(dtype)
    y_TO = _Linear.apply(x_TI.contiguous(), weight_OI.contiguous(), recipe, squared)
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

    Without gradients (evaluation) they multiply as ever, and so they do behind the block, also under what was put
    around them inside (`tensor`). Raises `UserError` if no layer is suitable.
    """
    layers = chosen(model, settings)
    if settings.recipe != "none" and not layers:
        raise UserError(
            f"train.fp8.recipe is {settings.recipe!r}, but no layer between the first and last {settings.ends} has "
            f"sides of at least {BLOCK} that are multiples of 16; set train.fp8.recipe to none, or train.fp8.ends lower"
        )
    open_to = {mlp.down_proj: mlp for mlp in model.modules() if isinstance(mlp, MLP) and not mlp.gated}
    squared = [open_to[module] for module in layers.values() if module in open_to]
    here: dict[nn.Module, Any] = {m: _forward(m, settings.recipe, m in open_to) for m in layers.values()}
    here |= {mlp: _through(mlp) for mlp in squared}
    inside, before = [True], {module: vars(module).get("forward") for module in here}
    for module, forward in here.items():
        here[module] = module.forward = partial(_either, inside, forward, module.forward)
    try:
        yield list(layers)
    finally:
        inside.clear()
        for module, forward in here.items():
            if vars(module)["forward"] is forward:
                del module.forward
                vars(module).update({"forward": before[module]} if before[module] else {})


def _either(inside: list[bool], here: Any, before: Any, *args: Any) -> Any:
    return (here if inside else before)(*args)


def _forward(module: nn.Linear, recipe: str, squared: bool) -> Any:
    def forward(x_TI: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return ops.linear(ops.relu2(x_TI) if squared else x_TI, module.weight, module.bias)
        return linear(x_TI, module.weight, module.bias, recipe, squared)

    return forward


def _through(mlp: MLP) -> Any:
    """`down_proj` takes what `up_proj` gives, and squares it while it rounds it."""

    def forward(x_TD: Tensor, *_: Any) -> Tensor:
        return mlp.down_proj(mlp.up_proj(x_TD))

    return forward
