"""The truth: every operation written the obvious way, token by token, in the dtype it is given (tests use float64).

Nothing here is fast and nothing here is clever. The other implementations are tested against it. T tokens, S
sequences, H heads, P head width, N state size, G groups, I channels of the convolution, W its width, K key/value
heads, E attention head width, D model width, V vocabulary.
"""

from whimbrel.ops.reference.attention import attention, paged_attention, rotary
from whimbrel.ops.reference.head import cross_entropy, kl, log_prob
from whimbrel.ops.reference.mamba import conv, conv_step, gated_norm, mamba_step, ssd, ssd_step, step_size
from whimbrel.ops.reference.pointwise import layer_norm_1p, linear, relu2, rms_norm, swiglu

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
