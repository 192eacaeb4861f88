"""The two norms of these families, as modules that only hold weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from whimbrel import ops
from whimbrel.model.config import ModelConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight over D."""

    def __init__(self, width: int, eps: float, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return ops.rms_norm(x_TD, self.weight, self.eps)


class LayerNorm1P(nn.Module):
    """LayerNorm with a weight stored minus one and a bias (Nemotron-4, arXiv 2402.16819)."""

    def __init__(self, width: int, eps: float, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return ops.layer_norm_1p(x_TD, self.weight, self.bias, self.eps)


def make_norm(config: ModelConfig, device: torch.device | str | None, dtype: torch.dtype) -> RMSNorm | LayerNorm1P:
    """The norm that stands before every mixer and after the last layer."""
    kind = RMSNorm if config.norm == "rmsnorm" else LayerNorm1P
    return kind(config.hidden_size, config.norm_eps, device, dtype)
