"""Arithmetic, and nothing else: tensors in, tensors out, no knowledge of models.

Every operation has a truth (`ops/reference`, obvious, in float64) and one or more fast forms that are tested against
it (`ops/torch` on every device, `ops/cpu` where the native library was built, `ops/triton` on a GPU where triton is
installed). Callers use the names here; which form runs is decided below, in one place.

Letters of shapes: T packed tokens, S sequences or slots, D model width, V vocabulary, H heads, P head width of Mamba,
N state size, G groups, I channels of the convolution, W its width, K key/value heads, E head width of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from whimbrel.ops import cpu, reference, split
from whimbrel.ops import torch as vectorised
from whimbrel.ops.cpu.matmul import reading_prompts, rounding
from whimbrel.ops.segments import Segments
from whimbrel.ops.torch.mamba import of_parts

OPERATIONS = tuple(reference.__all__)
_FORMS: dict[str, ModuleType] = {"cpu": cpu, "torch": vectorised, "reference": reference}
_preferred = ["cpu", "torch", "reference"]


@cache
def gpu() -> tuple[ModuleType | None, str]:
    """The form for GPUs (`ops/triton`), or None and why it is not there."""
    try:
        return import_module("whimbrel.ops.triton"), ""
    except ImportError as error:
        return None, f"{error}; CUDA builds of torch bring triton"


def active(device: str = "cpu") -> dict[str, str]:
    """Operation -> the form that runs now: for float32 on a CPU `cpu` (the native library), `torch` or `reference`; on
    `cuda` `triton` before these.
    """
    here = [form for form in _preferred if form != "cpu" or cpu.load()[0] is not None]
    forms: dict[str, ModuleType] = dict(_FORMS)
    if device != "cpu":
        here.remove("cpu")
        if (kernels := gpu()[0]) is not None:
            here, forms = ["triton", *here], forms | {"triton": kernels}
    return {name: next(form for form in here if hasattr(forms[form], name)) for name in OPERATIONS}


def native() -> bool:
    """Does the native library run (for what it has)?"""
    return _preferred[0] == "cpu" and cpu.load()[0] is not None


@contextmanager
def using(form: str) -> Iterator[None]:
    """Run every operation in one form inside the block, for tests and for finding faults."""
    if form == "triton" and gpu()[0] is not None:
        _FORMS["triton"] = gpu()[0]  # type: ignore[assignment]
    if form not in _FORMS:
        raise ValueError(f"form is {form!r}; set it to one of {', '.join(_FORMS)}")
    before = list(_preferred)
    _preferred.insert(0, form)
    try:
        yield
    finally:
        _preferred[:] = before


def _operation(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) > 1 and isinstance(args[1], split.SplitVocabulary):
            return getattr(split, name)(*args, **kwargs)
        if args[0].is_cuda and _preferred[0] == "cpu" and (kernel := getattr(gpu()[0], name, None)) is not None:
            return kernel(*args, **kwargs)
        for form in _preferred:
            found = getattr(_FORMS[form], name, None)
            if found is not None:
                return found(*args, **kwargs)
        raise AssertionError(name)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = getattr(reference, name).__doc__
    return call


attention = _operation("attention")
conv = _operation("conv")
conv_step = _operation("conv_step")
cross_entropy = _operation("cross_entropy")
gated_norm = _operation("gated_norm")
kl = _operation("kl")
layer_norm_1p = _operation("layer_norm_1p")
linear = _operation("linear")
log_prob = _operation("log_prob")
mamba_step = _operation("mamba_step")
paged_attention = _operation("paged_attention")
relu2 = _operation("relu2")
rms_norm = _operation("rms_norm")
rotary = _operation("rotary")
ssd = _operation("ssd")
ssd_step = _operation("ssd_step")
step_size = _operation("step_size")
swiglu = _operation("swiglu")


_of_parts = of_parts(step_size, conv, ssd, gated_norm)


def mamba_layer(*row: Any) -> Any:
    """Whole sequences through a Mamba-2 layer between its projections, nothing before them: [z | x | B | C | dt] [T, K]
    -> RMSNorm(y silu(z)) [T, D]. The library has it as one step; elsewhere it is made of the operations above.

    After z: weight [I, W] and bias of the convolution, bias of dt, A, D, weight of the norm; segments, groups, eps, and
    limits of dt.
    """
    whole = cpu.mamba_layer(*row) if _preferred[0] == "cpu" else None
    return _of_parts(*row) if whole is None else whole


def linear_relu2(x_TD: Any, weight_FD: Any) -> Any:
    """relu(x W^T)^2 [T, F], where the library can in one step; the inputs of the square are kept by neither pass."""
    whole = cpu.linear_relu2(x_TD, weight_FD) if _preferred[0] == "cpu" else None
    return relu2(linear(x_TD, weight_FD)) if whole is None else whole


__all__ = [*OPERATIONS, "Segments", "active", "cpu", "gpu", "linear_relu2", "mamba_layer", "native"]
__all__ += ["reading_prompts", "rounding", "using"]
