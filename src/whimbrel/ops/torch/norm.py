"""Norms and activations, computed in float32 at least and returned in the dtype that came in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from whimbrel.ops import fp8
from whimbrel.ops.packed import Packed, unpack


def step_size(dt_TH: Tensor, bias_H: Tensor, limit: tuple[float, float]) -> Tensor:
    """softplus(dt + bias), clamped to `limit`. [T, H], at least float32."""
    dtype = torch.promote_types(dt_TH.dtype, torch.float32)
    dt = F.softplus(dt_TH.to(dtype) + bias_H.to(dtype))
    return dt if limit == (0.0, float("inf")) else dt.clamp(*limit)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return F.rms_norm(x_TD.to(dtype), (x_TD.shape[-1],), weight_D.to(dtype), eps).to(x_TD.dtype)


def layer_norm_1p(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """LayerNorm with a weight stored minus one: (1 + weight) * (x - mean) / sqrt(var + eps) + bias (Nemotron-4)."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return F.layer_norm(x_TD.to(dtype), (x_TD.shape[-1],), weight_D.to(dtype) + 1, bias_D.to(dtype), eps).to(x_TD.dtype)


def gated_norm(y_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """RMSNorm(y * silu(gate)) inside each of `groups` groups of channels, then the weight: the gate comes first."""
    dtype = torch.promote_types(y_TD.dtype, torch.float32)
    gated = (y_TD.to(dtype) * F.silu(gate_TD.to(dtype))).unflatten(-1, (groups, -1))
    unit = F.rms_norm(gated, (gated.shape[-1],), None, eps)
    return (unit.flatten(-2) * weight_D.to(dtype)).to(y_TD.dtype)


def linear(x_TD: Tensor, weight_OD: Tensor | Packed, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias. A packed matrix is unpacked first, to the dtype of x; with one in FP8 x is rounded to FP8 too."""
    if isinstance(weight_OD, Packed) and weight_OD.form == "fp8":
        return fp8.linear(x_TD, weight_OD, bias_O)
    return F.linear(x_TD, unpack(weight_OD).to(x_TD.dtype) if isinstance(weight_OD, Packed) else weight_OD, bias_O)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (arXiv 2109.08668). A product, since torch's `pow` is slower."""
    positive = F.relu(x)
    return positive * positive


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up (arXiv 2002.05202)."""
    return F.silu(gate) * up
