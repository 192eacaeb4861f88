"""Finding and loading the native library, and calling it with tensors. Without it everything runs in `ops/torch`."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {"darwin": "libwhimbrel.dylib", "win32": "whimbrel.dll"}


def _candidates() -> list[Path]:
    """Beside this file (an installed package), or in site-packages while this file lies in a source tree (editable)."""
    name = _NAMES.get(sys.platform, "libwhimbrel.so")
    inside = Path("whimbrel", "ops", "cpu", name)
    return [Path(__file__).with_name(name), *(Path(folder) / inside for folder in sys.path if folder)]


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason. torch is loaded before it: the library uses torch's own OpenMP threads."""
    for path in _candidates():
        if path.is_file():
            try:
                library = ctypes.CDLL(str(path))
            except OSError as error:
                return None, f"{path.name} does not load: {error}"
            library.whimbrel_isa.restype = ctypes.c_char_p
            return library, ""
    return None, "it was not built when the package was installed (no C++ compiler?)"


def isa() -> str | None:
    """The instruction set in use (bf16, vnni: beyond avx512; avx512, avx2, baseline), or None without the library."""
    library, _ = load()
    return None if library is None else library.whimbrel_isa().decode()


def use(name: str) -> bool:
    """Run in a narrower instruction set, for tests; False if this processor does not have it."""
    library, _ = load()
    return library is not None and bool(library.whimbrel_use(name.encode()))


def fits(*tensors: Tensor | None) -> bool:
    """Can the library take these? It takes float32 on the CPU."""
    if load()[0] is None:
        return False
    return all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in tensors)


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers begin; None for none."""
    return None if tensor is None else tensor.data_ptr()


def by_rows(x: Tensor) -> Tensor:
    """A matrix whose numbers are neighbours within a row: itself, or a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def by_tokens(x: Tensor) -> Tensor:
    """[T, H, P] whose tokens may lie apart, but whose numbers within a token are neighbours: itself, or a copy."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def structure(name: str, pointers: str, numbers: str, reals: str = "") -> type[ctypes.Structure]:
    """A C struct of the header: pointers, then 64-bit integers, then floats, in its order."""
    fields: list[tuple[str, Any]] = [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [(field, ctypes.c_int64) for field in numbers.split()]
    fields += [(field, ctypes.c_float) for field in reals.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def call(name: str, *structures: ctypes.Structure) -> None:
    """Run one native function on torch's number of threads."""
    library, reason = load()
    assert library is not None, reason
    begin = time.perf_counter() if _clocks else 0.0
    getattr(library, f"whimbrel_{name}")(*(ctypes.byref(s) for s in structures), torch.get_num_threads())
    for clock in _clocks:
        clock.seconds += time.perf_counter() - begin


@dataclass
class Clock:
    """Time spent in native calls, as their caller sees it: waiting for threads included."""

    seconds: float = 0.0


_clocks: list[Clock] = []


@contextmanager
def timed() -> Iterator[Clock]:
    """Count the time of native calls inside the block; outside of one a call costs nothing more."""
    _clocks.append(clock := Clock())
    try:
        yield clock
    finally:
        _clocks.pop()
