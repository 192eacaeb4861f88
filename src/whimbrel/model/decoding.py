"""One native call for a layer of decoding, where the library has one: attention and feed-forward, float32 on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from whimbrel import ops
from whimbrel.model.attention import Attention
from whimbrel.model.layout import Layout
from whimbrel.model.mlp import MLP
from whimbrel.model.norm import RMSNorm
from whimbrel.model.state import State
from whimbrel.ops.cpu import AttentionStep, MlpStep


class Decoder:
    """The native side of one layer. It reads the layer's weights anew in every call, so it is never out of date."""

    def __init__(self, norm: nn.Module, mixer: nn.Module) -> None:
        self.norm, self.mixer = norm, mixer
        self.step: AttentionStep | MlpStep | None = None
        if isinstance(norm, RMSNorm) and isinstance(mixer, Attention | MLP):
            self.step = AttentionStep() if isinstance(mixer, Attention) else MlpStep()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins anew: addresses are worth nothing elsewhere."""
        return Decoder, (self.norm, self.mixer)

    def __call__(self, x_SD: Tensor, layout: Layout, state: State, layer: int) -> Tensor | None:
        """x + mixer(norm(x)) [S, D] for sequences of one token each; None where only the general path does it."""
        few = x_SD.shape[0] <= ops.cpu.FEW and not torch.is_grad_enabled()
        if self.step is None or not few or not ops.native():
            return None
        norm: Any = self.norm
        mixer: Any = self.mixer
        if isinstance(self.step, MlpStep):
            weights = _weights(norm, mixer, ("up_proj", "gate_proj", "down_proj"))
            return None if weights is None else self.step(x_SD, weights, norm.eps)
        weights = _weights(norm, mixer, ("q_proj", "k_proj", "v_proj", "o_proj"))
        if weights is None:
            return None
        own = mixer._parameters
        weights += [own.get("q_norm_weight"), own.get("k_norm_weight")]
        rotation = layout.rotation(mixer.config) if mixer.config.rope_theta is not None else None
        assert layout.block_table is not None, "a state with attention layers needs a block table"
        pools = state.k[layer], state.v[layer]
        return self.step(x_SD, weights, norm.eps, rotation, pools, layout.block_table, layout.key_counts())


def _weights(norm: nn.Module, mixer: nn.Module, names: tuple[str, ...]) -> list[Tensor | None] | None:
    """The norm's weight, the weights of the named projections, then their biases; None if one is not a plain Linear."""
    projections = [mixer._modules.get(name) for name in names]
    if any(type(p) is not nn.Linear for p in projections if p is not None):
        return None
    own = [{} if p is None else p._parameters for p in projections]
    return [norm._parameters["weight"], *(p.get("weight") for p in own), *(p.get("bias") for p in own)]
