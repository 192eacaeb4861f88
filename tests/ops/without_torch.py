"""Call the native library with ctypes alone: `python without_torch.py OPENMP LIBRARY` prints what comes out as JSON.

First the instruction set that it chose and whether it offers AVX2 and AVX-512; then, computed in the baseline form, a
gated norm, a scan, attention, and a projection with weights of 32, 16, 8 and 4 bits.
"""

import ctypes
import json
import math
import sys

ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
library = ctypes.CDLL(sys.argv[2])
library.whimbrel_isa.restype = ctypes.c_char_p
keep: list = []


def pointer(values, kind=ctypes.c_float):
    """The address of an array, which stays."""
    keep.append((kind * len(values))(*values))
    return ctypes.cast(keep[-1], ctypes.c_void_p)


def whole(values):
    """The same of whole numbers."""
    return pointer(values, ctypes.c_int64)


def row(count, by=0.37):
    """Numbers of all sizes from -1 to 1."""
    return [math.sin(by * i + i * i % 7) for i in range(count)]


def call(name, *fields):
    """Run a function on a struct of these fields; what is in the array that was made last."""
    kinds = {int: ctypes.c_int64, float: ctypes.c_float}
    typed = [(f"f{place}", kinds.get(type(field), ctypes.c_void_p)) for place, field in enumerate(fields)]
    struct = type("Struct", (ctypes.Structure,), {"_fields_": typed})
    getattr(library, f"whimbrel_{name}")(ctypes.byref(struct(*fields)), 1)
    return [round(value, 4) for value in keep[-1]]


def gated_norm():
    """10 tokens, 2 groups of 16."""
    y, gate, weight = map(pointer, map(row, (320, 320, 32)))
    scale, out = pointer([0] * 20), pointer([0] * 320)
    return call("gated_norm_forward", y, gate, weight, out, scale, 10, 2, 16, 32, 1e-5)


def scan():
    """Sequences of 33 and 7 tokens, 2 heads of 3, 1 group, state 5."""
    x, b, c, d = map(pointer, map(row, (240, 200, 200, 2)))
    dt, a, final = pointer([0.3] * 80), pointer([-0.5, -2.0]), pointer([0] * 60)
    pieces, first, slots, y = whole([0, 33, 40]), whole([0, 1, 2]), whole([-1, -1]), pointer([0] * 240)
    sizes = (2, 2, 3, 1, 5, 6, 5, 5)
    return call("scan_forward", x, dt, a, b, c, d, None, y, final, None, None, pieces, first, slots, *sizes)


def attention():
    """Sequences of 70 queries over 75 keys and of 2 over 2, 4 heads of 5, 2 key heads."""
    q, k, v = map(pointer, map(row, (72 * 20, 77 * 10, 77 * 10)))
    queries, keys, logs, y = whole([0, 70, 72]), whole([0, 75, 77]), pointer([0] * 72 * 4), pointer([0] * 72 * 20)
    return call("attention_forward", q, k, v, y, logs, queries, keys, 2, 4, 2, 5, 20, 10, 10)


def linear(kind):
    """3 rows of 64 inputs to 16 outputs."""
    codes = [place * 37 % 251 for place in range(16 * 64)]
    floats, halves = pointer(row(16 * 64)), pointer([0x3000 + code for code in codes], ctypes.c_uint16)
    weight = [floats, halves, *2 * [pointer(codes, ctypes.c_uint8)]][kind]
    scales = pointer([0x2000] * 32, ctypes.c_uint16)
    return call("linear", weight, scales, 16, 64, kind, 32, None, pointer(row(192)), pointer([0] * 48), 3)


found: list = [library.whimbrel_isa().decode(), library.whimbrel_use(b"avx2"), library.whimbrel_use(b"avx512")]
library.whimbrel_use(b"baseline")
print(json.dumps([*found, gated_norm(), scan(), attention(), *map(linear, range(4))]))
