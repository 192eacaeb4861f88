"""Kernels for GPUs in Triton, one a file. Importing this needs triton, which comes with CUDA builds of torch.

`ops` takes these for tensors on a GPU. Each is held against `ops/reference` in Triton's interpreter on a CPU, and
against both other forms on a GPU before anything is timed there (`benchmarks/gpu_measure.py`). What does not fit a kernel
(float64, float16, unusual widths) is left to `ops/torch`.
"""

from whimbrel.ops.triton.attention import attention, rotary
from whimbrel.ops.triton.conv import conv, conv_step
from whimbrel.ops.triton.fewbits import linear
from whimbrel.ops.triton.gated import gated_norm
from whimbrel.ops.triton.head import cross_entropy, kl, log_prob
from whimbrel.ops.triton.mamba import mamba_step
from whimbrel.ops.triton.norm import rms_norm
from whimbrel.ops.triton.paged import paged_attention
from whimbrel.ops.triton.pointwise import relu2, step_size, swiglu
from whimbrel.ops.triton.scan import ssd
from whimbrel.ops.triton.step import ssd_step

__all__ = [
    "attention",
    "conv",
    "conv_step",
    "cross_entropy",
    "gated_norm",
    "kl",
    "linear",
    "log_prob",
    "mamba_step",
    "paged_attention",
    "relu2",
    "rms_norm",
    "rotary",
    "ssd",
    "ssd_step",
    "step_size",
    "swiglu",
]
