"""The native products of training (native/src/matmul.cpp): of float32 matrices of many rows, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from whimbrel.ops.cpu.library import address, by_rows, call, isa, structure
from whimbrel.ops.cpu.pointwise import Relu2
from whimbrel.ops.memory import fresh

_Matmul = structure(
    "Matmul", "a b c", "rows columns depth a_row a_step b_step b_column c_row add levels squares rounded"
)
LEAST = 1 << 24
"""Multiplications from which our product is faster than torch's; below, a call from Python costs what it gains."""
FAST = ((512, 1024, 4096), (256, 1024, 1024))
"""Rows, depth and columns from which two levels of Strassen's products, and one, take less time than one product."""

_prompts: ContextVar[bool] = ContextVar("prompts", default=False)
_rounds: ContextVar[bool] = ContextVar("rounds", default=False)


@contextmanager
def _inside(switch: ContextVar[bool], on: bool) -> Iterator[None]:
    before = switch.set(on)
    try:
        yield
    finally:
        switch.reset(before)


def reading_prompts() -> AbstractContextManager[None]:
    """Inside, with gradients off, large projections take Strassen's way: 7 to 14 % less time, and errors that are
    relative to the largest rows.
    """
    return _inside(_prompts, True)


def rounding(on: bool) -> AbstractContextManager[None]:
    """Inside, if `on`, the library multiplies numbers rounded to bfloat16: projections, heads, and their gradients if
    the backward is inside too. Sums, and what is kept, stay float32. Twice as fast where the processor multiplies such
    numbers (`isa`: bf16), elsewhere as fast as before, for the same result but for the order of sums.
    """
    return _inside(_rounds, on)


def pays(rows: int, columns: int, depth: int) -> bool:
    """Is a product of this shape for the library?"""
    return rows * columns * depth >= LEAST and isa() != "baseline"


def product(
    a_RK: Tensor, b_KN: Tensor, c_RN: Tensor, add: bool = False, levels: int = 0, squares: bool = False
) -> Tensor:
    """a b into c, or added to it, native whatever it costs; a and b by rows or turned, c by rows. levels: how often
    seven products of quarters stand for eight (Strassen; native/src/matmul.cpp). squares: relu(a b)^2.
    Under `rounding` in bfloat16, and then without levels.
    """
    sizes = (a_RK.shape[0], b_KN.shape[1], a_RK.shape[1], *a_RK.stride(), *b_KN.stride(), c_RN.stride(0))
    call("matmul", _Matmul(address(a_RK), address(b_KN), address(c_RN), *sizes, add, levels, squares, _rounds.get()))
    return c_RN


def multiply(a_RK: Tensor, b_KN: Tensor, out_RN: Tensor, add: bool = False) -> Tensor:
    """As `product`, through torch where that is faster."""
    if pays(a_RK.shape[0], b_KN.shape[1], a_RK.shape[1]):
        return product(a_RK, b_KN, out_RN, add)
    return out_RN.addmm_(a_RK, b_KN) if add else torch.mm(a_RK, b_KN, out=out_RN)


def prompt_levels(rows: int, depth: int, columns: int) -> int:
    """How often a product of this shape is cut for Strassen: 0 but for large ones of prompts without gradients."""
    # Here and not in a Function: it runs without gradients, and a parameter asks for them whether they are on or off.
    if not _prompts.get() or torch.is_grad_enabled():
        return 0
    return sum(all(n >= least for n, least in zip((rows, depth, columns), sizes, strict=True)) for sizes in FAST)


def project(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, levels: int = 0, squares: bool = False) -> Tensor:
    """x W^T + bias of matrices by rows, native; levels and squares as `product` has them."""
    y_TO = product(x_TI, weight_OI.t(), fresh(x_TI.shape[0], weight_OI.shape[0]), levels=levels, squares=squares)
    return y_TO if bias_O is None else y_TO.add_(bias_O)


class NativeLinear(torch.autograd.Function):
    """x W^T + bias, or relu(x W^T)^2. Gradients of few rows are not worth it; callers ask `pays` first."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, squares: bool) -> Tensor:
        """[T, O]."""
        x_TI, weight_OI = by_rows(x_TI), by_rows(weight_OI)
        y_TO = project(x_TI, weight_OI, bias_O, 0, squares)
        ctx.save_for_backward(x_TI, weight_OI, y_TO if squares else None)
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Of x, W and bias, those that are asked for."""
        (x_TI, weight_OI, y_TO), dy_TO = ctx.saved_tensors, by_rows(gradients[0])
        x, weight, bias, _ = ctx.needs_input_grad
        if y_TO is not None:
            dy_TO, upstream = fresh(*y_TO.shape), dy_TO.contiguous()
            call("relu2", Relu2(*(address(v) for v in (y_TO, upstream, dy_TO)), y_TO.numel(), True))
        return (
            product(dy_TO, weight_OI, fresh(*x_TI.shape)) if x else None,
            product(dy_TO.t(), x_TI, fresh(*weight_OI.shape)) if weight else None,
            dy_TO.sum(0) if bias else None,
            None,
        )


def large(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, squares: bool = False) -> Tensor | None:
    """x W^T + bias, or relu(x W^T)^2; None where torch's product is faster."""
    if not pays(len(x_TI), *weight_OI.shape):
        return None
    if levels := prompt_levels(len(x_TI), weight_OI.shape[1], weight_OI.shape[0]):
        return project(by_rows(x_TI), by_rows(weight_OI), bias_O, levels, squares)
    return NativeLinear.apply(x_TI, weight_OI, bias_O, squares)
