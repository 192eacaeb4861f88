"""Feed-forward: squared ReLU without a gate (Nemotron), or SwiGLU (Qwen3, Llama)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from whimbrel import ops
from whimbrel.model.config import ModelConfig
from whimbrel.model.layout import Layout
from whimbrel.model.linear import Linear
from whimbrel.model.state import State


class MLP(nn.Module):
    """`down(relu(up(x))^2)`, or `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        wide, bias = config.intermediate_size, config.mlp_bias
        if config.mlp == "swiglu":
            self.gate_proj = Linear(config.hidden_size, wide, bias, device, dtype)
        self.gated = config.mlp == "swiglu"
        self.up_proj = Linear(config.hidden_size, wide, bias, device, dtype)
        self.down_proj = Linear(wide, config.hidden_size, bias, device, dtype)

    def forward(self, x_TD: Tensor, layout: Layout, state: State | None, layer: int) -> Tensor:
        """[T, D] -> [T, D]; every token by itself, so layout and state are not looked at."""
        up = self.up_proj
        plain = type(up) is Linear and up.bias is None and not up._forward_hooks and not up._forward_pre_hooks
        if plain and not self.gated:
            return self.down_proj(ops.linear_relu2(x_TD, up.weight))
        up_TF = up(x_TD)
        return self.down_proj(ops.swiglu(self.gate_proj(x_TD), up_TF) if self.gated else ops.relu2(up_TF))
