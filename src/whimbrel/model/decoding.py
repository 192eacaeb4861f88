"""Decoding in one native call for all layers, where the library is: float32 arithmetic on a CPU, weights of any bits.

What the library was told of a model is kept from step to step. Before each step the modules and the addresses of the
weights are compared with those it was told of, so it is never out of date.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from whimbrel import ops
from whimbrel.model.attention import Attention
from whimbrel.model.config import ModelConfig
from whimbrel.model.layout import Layout
from whimbrel.model.linear import Linear, PackedEmbedding, PackedLinear, PackedWeight
from whimbrel.model.mamba2 import Mamba2
from whimbrel.model.mlp import MLP
from whimbrel.model.norm import LayerNorm1P, RMSNorm
from whimbrel.model.positions import frequencies
from whimbrel.model.state import State
from whimbrel.ops.cpu import Decode, Matrix, Projection, fits, network, readable

# Of each mixer: its number in the library; its projections, in the library's order; its own parameters and their names
# there.
_MIXERS: dict[type, tuple[int, tuple[str, str, str, str], dict[str, str]]] = {
    Mamba2: (
        0,
        ("in_proj", "", "", "out_proj"),
        {
            "conv_weight": "conv_weight",
            "conv_bias": "conv_bias",
            "A_log": "a_log",
            "D": "d",
            "dt_bias": "dt_bias",
            "norm_weight": "gated_norm",
        },
    ),
    Attention: (1, ("q_proj", "k_proj", "v_proj", "o_proj"), {"q_norm_weight": "q_norm", "k_norm_weight": "k_norm"}),
    MLP: (2, ("up_proj", "gate_proj", "", "down_proj"), {}),
}


class _ForeignError(Exception):
    """The model has a part that the library does not have."""


class Decoder:
    """The native side of one model."""

    def __init__(self) -> None:
        self.modules: list[tuple[dict[str, Any], str]] = []
        self.tensors: list[tuple[dict[str, Any], str]] = []
        self.seen: tuple[list[Any], list[int]] | None = None
        """Modules and addresses that the library was told of; None before the first step."""
        self.pools: list[Any] = []
        """Addresses of the state it was told of, and how it lies there: memory that was freed comes back."""
        self.layers: Any = None
        self.step: Decode | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins anew: addresses are worth nothing elsewhere."""
        return Decoder, ()

    def __call__(self, model: Any, tokens_T: Tensor, layout: Layout, state: State) -> Tensor | None:
        """hidden_SD after the final norm, of the sequences that decode; None where only the general path does it."""
        if torch.is_grad_enabled() or not ops.native() or tokens_T.device.type != "cpu":
            return None
        if self._look() != self.seen:
            self._tell(model)
        if self.step is None or not self._point(state):
            return None
        assert layout.slots is not None
        table = layout.block_table
        return self.step.run(tokens_T[: layout.decodes], layout.slots, layout.key_counts(), table)

    def _look(self) -> tuple[list[Any], list[int]]:
        modules = [place.get(name) for place, name in self.modules]
        return modules, [place[name].data_ptr() for place, name in self.tensors]

    def _tell(self, model: Any) -> None:
        """Describe a model to the library; `step` is None if it has a part that the library does not have."""
        self.modules, self.tensors, self.pools = [(model._modules, "layers")], [], []
        config = model.config
        self.layers, self.step = network(config.layers)
        _sizes(self.step, config)
        if config.rope_theta is not None:
            self.frequencies_R = frequencies(config, torch.device("cpu"))
            self.step.frequencies, self.step.half = self.frequencies_R.data_ptr(), len(self.frequencies_R)
        try:
            for index, described in enumerate(self.layers):
                layer = self._module(model.layers, str(index))
                self._norm(described, layer, "norm")
                self._mixer(described, self._module(layer, "mixer"))
            self._norm(self.step, model, "norm_f")
            self.step.embeddings = self._matrix(self._module(model, "embeddings"), (nn.Embedding, PackedEmbedding))
        except _ForeignError:
            self.step = None
        self.seen = self._look()

    def _module(self, owner: nn.Module, name: str) -> nn.Module:
        self.modules.append((owner._modules, name))
        return owner._modules[name]  # type: ignore[return-value]

    def _address(self, places: dict[str, Any], name: str) -> int | None:
        """Of a float32 tensor; None where the model has none."""
        tensor = places.get(name)
        if tensor is None:
            return None
        if not fits(tensor) or not tensor.is_contiguous():
            raise _ForeignError
        self.tensors.append((places, name))
        return tensor.data_ptr()

    def _norm(self, described: Any, owner: nn.Module, name: str) -> None:
        norm = self._module(owner, name)
        if type(norm) not in (RMSNorm, LayerNorm1P):
            raise _ForeignError
        described.norm, described.norm_bias = (self._address(norm._parameters, leaf) for leaf in ("weight", "bias"))

    def _mixer(self, described: Any, mixer: nn.Module) -> None:
        if type(mixer) not in _MIXERS:
            raise _ForeignError
        described.kind, projections, own = _MIXERS[type(mixer)]
        for place, name in zip(("first", "second", "third", "last"), projections, strict=True):
            if name in mixer._modules:
                projection = self._module(mixer, name)
                matrix = self._matrix(projection, (nn.Linear, Linear, PackedLinear))
                setattr(described, place, Projection(matrix, self._address(projection._parameters, "bias")))
        for name, place in own.items():
            setattr(described, place, self._address(mixer._parameters, name))

    def _matrix(self, module: nn.Module, kinds: tuple[type, ...]) -> Matrix:
        if type(module) not in kinds:
            raise _ForeignError
        weight: Any = module._parameters.get("weight")
        if weight is not None:
            self._address(module._parameters, "weight")
            return Matrix.of(weight)
        packed = self._module(module, "weight")
        assert isinstance(packed, PackedWeight)
        if not readable(packed.value):
            raise _ForeignError
        self.tensors += [(packed._buffers, name) for name, held in packed._buffers.items() if held is not None]
        return Matrix.of(packed.value)

    def _point(self, state: State) -> bool:
        """Let the layers point to this state; False if the library cannot take it."""
        sides = {"conv": state.conv, "ssm": state.ssm, "keys": state.k, "values": state.v}
        pools: list[Any] = [(v.data_ptr(), v.dtype, v.stride()) for side in sides.values() for v in side.values()]
        pools.append(state.block_size)
        if pools == self.pools:
            return True
        tails = [tail.transpose(1, 2) for tail in state.conv.values()]
        kinds = {tensor.dtype for side in (state.k, state.v) for tensor in side.values()}
        dense = all(tensor.is_contiguous() for tensor in (*tails, *state.ssm.values()))
        if not dense or not fits(*tails, *state.ssm.values()) or len(kinds) > 1 or not kinds <= _KV:
            return False
        assert self.step is not None
        for name, side in sides.items():
            for index, tensor in side.items():
                setattr(self.layers[index], name, tensor.data_ptr())
        self.step.block_size, self.step.kv_half, self.pools = state.block_size, torch.float16 in kinds, pools
        return True


_KV = {torch.float32, torch.float16}


def _sizes(step: Decode, config: ModelConfig) -> None:
    step.width, step.eps = config.hidden_size, config.norm_eps
    step.heads, step.kv_heads, step.head_width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    step.mamba_heads, step.mamba_width, step.groups = config.mamba_num_heads, config.mamba_head_dim, config.n_groups
    step.state_size, step.conv_width = config.ssm_state_size, config.conv_kernel
    step.least_step, step.most_step = config.time_step_limit
