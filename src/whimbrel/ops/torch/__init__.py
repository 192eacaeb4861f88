"""The default implementation: vectorised, differentiable, on every device torch runs on."""

from whimbrel.ops.torch.attention import attention, paged_attention, rotary
from whimbrel.ops.torch.convolution import conv, conv_step
from whimbrel.ops.torch.head import cross_entropy, kl, log_prob
from whimbrel.ops.torch.mamba import mamba_step
from whimbrel.ops.torch.norm import gated_norm, layer_norm_1p, linear, relu2, rms_norm, step_size, swiglu
from whimbrel.ops.torch.scan import ssd, ssd_step

__all__ = [
    "attention",
    "conv",
    "conv_step",
    "cross_entropy",
    "gated_norm",
    "kl",
    "layer_norm_1p",
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
