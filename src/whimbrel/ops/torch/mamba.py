"""A Mamba-2 layer between its projections, whole sequences or one token of each: the parts one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from whimbrel.ops.segments import Segments
from whimbrel.ops.torch.convolution import conv_step
from whimbrel.ops.torch.norm import gated_norm, step_size
from whimbrel.ops.torch.scan import ssd_step


def parts(z_SK: Tensor, conv_IW: Tensor, norm_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What in_proj gives, [z | x | B | C | dt]: the gate, the channels of the convolution, and dt."""
    inner, channels = len(norm_D), len(conv_IW)
    gate_SD, mixed_SI, dt_SH = z_SK.split([inner, channels, z_SK.shape[1] - inner - channels], dim=-1)
    return gate_SD, mixed_SI, dt_SH


def heads(mixed_SI: Tensor, count: int, inner: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_SHP, b_SGN, c_SGN of the convolution's channels."""
    shared = (mixed_SI.shape[1] - inner) // 2
    x, b, c = mixed_SI.split([inner, shared, shared], dim=-1)
    return x.unflatten(-1, (count, -1)), b.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1))


Operation = Callable[..., Any]


def of_parts(step_size: Operation, conv: Operation, ssd: Operation, gated_norm: Operation) -> Callable[..., Tensor]:
    """A layer of whole sequences made of these operations."""

    def mamba_layer(
        z_TK: Tensor,
        conv_IW: Tensor,
        conv_bias_I: Tensor | None,
        dt_bias_H: Tensor,
        a_H: Tensor,
        d_H: Tensor,
        norm_D: Tensor,
        segments: Segments,
        groups: int,
        eps: float,
        limit: tuple[float, float] = (0.0, float("inf")),
    ) -> Tensor:
        """[z | x | B | C | dt] -> RMSNorm(y silu(z)) [T, D], nothing before the sequences."""
        gate_TD, mixed_TI, dt_TH = parts(z_TK, conv_IW, norm_D)
        mixed_TI, _ = conv(mixed_TI, conv_IW, conv_bias_I, segments)
        x, b, c = heads(mixed_TI, len(a_H), len(norm_D), groups)
        y_THP = ssd(x, step_size(dt_TH, dt_bias_H, limit), a_H, b, c, d_H, segments)[0]
        return gated_norm(y_THP.flatten(1), gate_TD, norm_D, groups, eps)

    return mamba_layer


def mamba_step(
    z_SK: Tensor,
    conv_IW: Tensor,
    conv_bias_I: Tensor | None,
    dt_bias_H: Tensor,
    a_H: Tensor,
    d_H: Tensor,
    norm_D: Tensor,
    tail: Tensor,
    state: Tensor,
    slots_S: Tensor,
    groups: int,
    eps: float,
    limit: tuple[float, float] = (0.0, float("inf")),
    seed: Tensor | None = None,
) -> Tensor:
    """[z | x | B | C | dt] -> RMSNorm(y silu(z)) [S, D]; `tail` and `state` are advanced in place. No gradient.

    `seed` is that of `ssd_step`, for a float16 state.
    """
    gate_SD, mixed_SI, dt_SH = parts(z_SK, conv_IW, norm_D)
    x, b, c = heads(conv_step(mixed_SI, conv_IW, conv_bias_I, tail, slots_S), len(a_H), len(norm_D), groups)
    y_SHP = ssd_step(x, step_size(dt_SH, dt_bias_H, limit), a_H, b, c, d_H, state, slots_S, seed)
    return gated_norm(y_SHP.flatten(1), gate_SD, norm_D, groups, eps)
