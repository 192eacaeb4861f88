"""Grouped-query attention with no, partial or full rotary positions and optional norms on q and k.

T tokens, S sequences, H heads, K key/value heads, E head width, R half of the rotating channels, U keys of all
sequences, history included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from whimbrel import ops
from whimbrel.model.config import ModelConfig
from whimbrel.model.layout import Layout
from whimbrel.model.linear import Linear
from whimbrel.model.state import State


class Attention(nn.Module):
    """q, k, v; norms; rotary; causal attention inside each sequence; output projection."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        width, wide = config.hidden_size, config.num_attention_heads * config.head_dim
        narrow, bias = config.num_key_value_heads * config.head_dim, config.attention_bias
        self.q_proj = Linear(width, wide, bias, device, dtype)
        self.k_proj = Linear(width, narrow, bias, device, dtype)
        self.v_proj = Linear(width, narrow, bias, device, dtype)
        self.o_proj = Linear(wide, width, bias, device, dtype)
        if config.qk_norm:
            self.q_norm_weight = nn.Parameter(torch.ones(config.head_dim, device=device, dtype=dtype))
            self.k_norm_weight = nn.Parameter(torch.ones(config.head_dim, device=device, dtype=dtype))

    def forward(self, x_TD: Tensor, layout: Layout, state: State | None, layer: int) -> Tensor:
        """[T, D] -> [T, D]. With a state, keys and values are written to the blocks of each sequence and history is
        read there.
        """
        q_THE, k_TKE, v_TKE = self._project(x_TD, layout)
        if state is None:
            k_UKE, v_UKE, keys = layout.exchange.keys(k_TKE, v_TKE, layout.segments)
            y_THE = ops.attention(q_THE, k_UKE, v_UKE, layout.segments, keys)
        else:
            y_THE = _cached(q_THE, k_TKE, v_TKE, layout, state, layer)
        y_TD = layout.wanted(y_THE.flatten(1))
        return self.o_proj(y_TD) if len(y_TD) else x_TD[:0]

    def _project(self, x_TD: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        q_THE = self.q_proj(x_TD).unflatten(-1, (-1, config.head_dim))
        k_TKE = self.k_proj(x_TD).unflatten(-1, (-1, config.head_dim))
        v_TKE = self.v_proj(x_TD).unflatten(-1, (-1, config.head_dim))
        if config.qk_norm:
            q_THE = ops.rms_norm(q_THE, self.q_norm_weight, config.norm_eps)
            k_TKE = ops.rms_norm(k_TKE, self.k_norm_weight, config.norm_eps)
        if config.rope_theta is not None:
            cos_TR, sin_TR = layout.rotation(config)
            q_THE, k_TKE = ops.rotary(q_THE, cos_TR, sin_TR), ops.rotary(k_TKE, cos_TR, sin_TR)
        return q_THE, k_TKE, v_TKE


def _cached(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layout: Layout, state: State, layer: int) -> Tensor:
    """Write this call's keys and values, then attend over everything each sequence has."""
    keys, values = state.k[layer], state.v[layer]
    places_T = layout.places(state.block_size)
    keys.flatten(0, 1)[places_T] = k_TKE.to(keys.dtype)
    values.flatten(0, 1)[places_T] = v_TKE.to(values.dtype)
    count = layout.decodes
    parts = []
    if count:
        assert layout.block_table is not None
        # On a GPU they are there already; nothing is copied, and a recorded step sees each step's own.
        counts = layout.key_counts()[:count] if q_THE.is_cuda else [past + 1 for past in layout.past[:count]]
        parts.append(ops.paged_attention(q_THE[:count], keys, values, layout.block_table, counts))
    rest = layout.others()
    if rest.tokens:
        cut, k_UKE, v_UKE = rest, k_TKE[count:], v_TKE[count:]
        if any(layout.past[count:]):
            cut, places_U = layout.history(state.block_size)
            k_UKE, v_UKE = (pool.flatten(0, 1)[places_U].to(q_THE.dtype) for pool in (keys, values))
        parts.append(ops.attention(q_THE[count:], k_UKE, v_UKE, rest, cut))
    return torch.cat(parts) if len(parts) > 1 else parts[0]
