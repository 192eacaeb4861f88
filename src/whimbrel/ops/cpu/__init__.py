"""The native form for CPUs: a shared library in C++ behind a plain C interface, chosen by the processor's features.

Operations that are not here run in `ops/torch`, and so does everything where the library was not built.
"""

from whimbrel.ops.cpu.library import isa, load, use
from whimbrel.ops.cpu.linear import FEW, linear
from whimbrel.ops.cpu.pointwise import conv, gated_norm
from whimbrel.ops.cpu.scan import ssd
from whimbrel.ops.cpu.step import AttentionStep, MlpStep

__all__ = ["FEW", "AttentionStep", "MlpStep", "conv", "gated_norm", "isa", "linear", "load", "ssd", "use"]
