"""Norms and activations, computed in float32 at least and returned in the dtype that came in."""

from __future__ import annotations

import torch
from torch import Tensor

from whimbrel.ops.packed import Packed, unpack


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim."""
    x = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    return (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight_D.to(x.dtype)).to(x_TD.dtype)


def layer_norm_1p(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """LayerNorm with a weight stored minus one: (1 + weight) * (x - mean) / sqrt(var + eps) + bias (Nemotron-4)."""
    x = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return (unit * (1 + weight_D.to(x.dtype)) + bias_D.to(x.dtype)).to(x_TD.dtype)


def linear(x_TD: Tensor, weight_OD: Tensor | Packed, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias."""
    weight = unpack(weight_OD).to(x_TD.dtype) if isinstance(weight_OD, Packed) else weight_OD
    y_TO = (x_TD[:, None, :] * weight).sum(-1)
    return y_TO if bias_O is None else y_TO + bias_O


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (arXiv 2109.08668)."""
    return torch.clamp(x, min=0) ** 2


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up (arXiv 2002.05202)."""
    return gate * torch.sigmoid(gate) * up
