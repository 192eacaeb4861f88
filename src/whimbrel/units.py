"""Bytes, rates and counts as people write them. Standard library only, so that every room may use it.

`GiB` is 2**30 and `GB` is 10**9, as on a data sheet; the letters' case does not matter.
"""

from __future__ import annotations

import re

from whimbrel.errors import UserError

_BYTES = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgtp", start=1)},
}
_FLOPS = {f"{letter}flop": 1000**power for power, letter in enumerate(["", "k", "m", "g", "t", "p"])}
_NUMBER = re.compile(r"\s*(\d+(?:_\d+)*(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str | int, name: str = "memory") -> int:
    """`22GiB`, `22GB`, `600 MB` or plain bytes as a whole number of bytes; `name` is the setting in an error."""
    if isinstance(text, int):
        number = float(text)
    else:
        number = _parse(text, _BYTES, f"{name} is {text!r}; set {name} to a size such as 22GiB, 22GB or 600MB")
    if number < 1:
        raise UserError(f"{name} is {text!r}; set {name} to at least one byte, such as 22GiB")
    return int(number)


def parse_bandwidth(text: str | float, name: str = "bandwidth") -> float:
    """`600GB/s`, `4.8TB/s` (the `/s` may be missing) or plain bytes per second as bytes per second."""
    return _rate(text, _BYTES, name, "600GB/s or 4.8TB/s")


def parse_flops(text: str | float, name: str = "peak") -> float:
    """`790TFLOP/s`, `160GFLOP/s` (`GFLOPS` too) as floating point operations per second."""
    return _rate(text, _FLOPS, name, "790TFLOP/s or 160GFLOP/s")


def _rate(text: str | float, units: dict[str, int], name: str, example: str) -> float:
    help_line = f"{name} is {text!r}; set {name} to a rate such as {example}"
    if isinstance(text, str):
        text = _parse(text.strip().lower().removesuffix("/s").replace("flops", "flop"), units, help_line)
    if not 0 < text < float("inf"):
        raise UserError(help_line)
    return float(text)


def _parse(text: str, units: dict[str, int], help_line: str) -> float:
    match = _NUMBER.fullmatch(text)
    if not match or match[2].lower() not in units:
        raise UserError(help_line)
    return float(match[1]) * units[match[2].lower()]


def format_bytes(count: float) -> str:
    """Bytes in the largest binary unit that leaves a number of one or more: `18.69 GiB`, `512 B`."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(count) >= 0.999995 * 2**power:
            return f"{count / 2**power:.2f} {unit}"
    return f"{count:.0f} B"


def format_count(count: float) -> str:
    """A count with four significant digits: `8.888B`, `134.5M`, `297k`; whole below ten thousand."""
    if abs(count) < 10_000:
        return f"{count:.0f}"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= 0.99995 * size:
            return f"{count / size:.4g}{letter}"
    raise AssertionError("unreachable")
