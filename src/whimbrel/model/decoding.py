"""One native call for a layer of decoding, where the library has one: attention and feed-forward, float32 on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from whimbrel import ops
from whimbrel.model.attention import Attention
from whimbrel.model.layout import Layout
from whimbrel.model.mlp import MLP
from whimbrel.model.norm import RMSNorm
from whimbrel.model.state import State


def native_step(
    norm: nn.Module, mixer: nn.Module, x_SD: Tensor, layout: Layout, state: State, layer: int
) -> Tensor | None:
    """x + mixer(norm(x)) [S, D] for sequences of one token each, or None where only the general path does it."""
    few = x_SD.shape[0] <= ops.cpu.FEW and not torch.is_grad_enabled()
    if not few or not ops.native() or not isinstance(norm, RMSNorm):
        return None
    if isinstance(mixer, MLP):
        gate = mixer.gate_proj if mixer.gated else None
        return ops.cpu.mlp_step(x_SD, norm.weight, norm.eps, mixer.up_proj, gate, mixer.down_proj)
    if isinstance(mixer, Attention):
        assert layout.block_table is not None, "a state with attention layers needs a block table"
        config = mixer.config
        norms = (mixer.q_norm_weight, mixer.k_norm_weight) if config.qk_norm else (None, None)
        return ops.cpu.attention_step(
            x_SD,
            norm.weight,
            norm.eps,
            (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj),
            norms,
            layout.rotation(config) if config.rope_theta is not None else None,
            (state.k[layer], state.v[layer]),
            layout.block_table,
            layout.key_counts(),
        )
    return None
