"""The native form for CPUs: a shared library in C++ behind a plain C interface, chosen by the processor's features.

Operations that are not here run in `ops/torch`, and so does everything where the library was not built.
"""

from whimbrel.ops.cpu.attention import attention
from whimbrel.ops.cpu.decode import Decode, network
from whimbrel.ops.cpu.head import cross_entropy, kl, log_prob
from whimbrel.ops.cpu.library import fits, isa, load, use
from whimbrel.ops.cpu.linear import FEW, linear, linear_relu2
from whimbrel.ops.cpu.mamba import mamba_layer
from whimbrel.ops.cpu.matrix import Matrix, Projection, readable
from whimbrel.ops.cpu.pointwise import conv, gated_norm, relu2, rms_norm
from whimbrel.ops.cpu.scan import ssd

__all__ = ["FEW", "Decode", "Matrix", "Projection", "attention", "conv", "cross_entropy", "fits", "gated_norm", "isa"]
__all__ += ["kl", "linear", "linear_relu2", "load", "log_prob", "mamba_layer", "network", "readable", "relu2"]
__all__ += ["rms_norm", "ssd", "use"]
