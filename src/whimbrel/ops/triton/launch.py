"""How kernels are launched: block sizes, warps and pipeline stages, by device, kernel and shape, from saved tables.

A table is `tables/DEVICE.json`: {"device", "origin", "kernels": {kernel: {shape: {setting: number}}}}. A shape is written
"P=64,N=128"; "*" is any other. `benchmarks/gpu_tune.py` writes one on a GPU. A device without a table takes the H200's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLES = Path(__file__).parent / "tables"
DEFAULT = "nvidia-h200"
_trials: dict[str, dict[str, int]] = {}


def device_name() -> str:
    """The name of a table of this GPU: `nvidia-h200`."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else DEFAULT
    return "-".join(name.lower().split())


@cache
def table(name: str) -> dict[str, Any]:
    """A saved table, or the default one where this device has none."""
    path = TABLES / f"{name}.json"
    return dict(json.loads((path if path.exists() else TABLES / f"{DEFAULT}.json").read_text(encoding="utf-8")))


@cache
def _found(kernel: str, shape: str) -> dict[str, int]:
    shapes = table(device_name())["kernels"][kernel]
    return dict(shapes.get(shape) or shapes["*"])


def settings(kernel: str, **shape: int) -> dict[str, int]:
    """The settings of a kernel for a shape: those being tried, else those saved."""
    words = ",".join(f"{name}={size}" for name, size in shape.items())
    return _trials.get(kernel) or _found(kernel, words)


@contextmanager
def trial(kernel: str, values: dict[str, int]) -> Iterator[None]:
    """Launch a kernel with these settings inside the block, whatever its shape."""
    before = dict(_trials)
    _trials[kernel] = values
    try:
        yield
    finally:
        _trials.clear()
        _trials.update(before)


def power(number: int, least: int = 1) -> int:
    """The next power of two, at least `least`: what a block's side must be."""
    return max(least, 1 << max(0, number - 1).bit_length())


def cdiv(number: int, by: int) -> int:
    """Blocks of `by` that cover `number`."""
    return -(-number // by)


def rows(x: torch.Tensor) -> torch.Tensor:
    """[..., D] as rows [R, D] whose numbers are neighbours; rows may lie apart."""
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def fits(*tensors: torch.Tensor | None) -> bool:
    """Can the kernels take these: float32 or bfloat16, all on one device, and really there?"""
    return all(t is None or (t.dtype in (torch.float32, torch.bfloat16) and not t.is_meta) for t in tensors)
