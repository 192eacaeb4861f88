"""Mamba-2 with grouped B and C and a gated norm inside each group (arXiv 2405.21060; Nemotron-H, arXiv 2504.03624,
section 2.1).

in_proj -> [z | x | B | C | dt]; convolution and SiLU over x, B, C; scan; RMSNorm(y * silu(z)) by group; out_proj. T
tokens, S sequences, H heads, P head width, N state size, G groups, I = HP + 2GN channels of the convolution, W its
width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from whimbrel import ops
from whimbrel.model.config import ModelConfig
from whimbrel.model.layout import ALONE, Layout
from whimbrel.model.linear import Linear
from whimbrel.model.state import State
from whimbrel.ops.torch import mamba


class Mamba2(nn.Module):
    """One Mamba-2 mixer. A_log, D and dt_bias stay in float32 whatever the model's dtype."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        heads, inner = config.mamba_num_heads, config.mamba_inner
        self.in_proj = Linear(config.hidden_size, config.in_proj_width, config.mamba_bias, device, dtype)
        self.conv_weight = nn.Parameter(
            torch.empty(config.conv_channels, config.conv_kernel, device=device, dtype=dtype)
        )
        self.conv_bias = (
            nn.Parameter(torch.zeros(config.conv_channels, device=device, dtype=dtype)) if config.conv_bias else None
        )
        self.A_log = nn.Parameter(torch.zeros(heads, device=device, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(heads, device=device, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.zeros(heads, device=device, dtype=torch.float32))
        self.norm_weight = nn.Parameter(torch.ones(inner, device=device, dtype=dtype))
        self.out_proj = Linear(inner, config.hidden_size, config.mamba_bias, device, dtype)

    def forward(self, x_TD: Tensor, layout: Layout, state: State | None, layer: int) -> Tensor:
        """[T, D] -> [T, D], or of the rows that are wanted. With a state, each sequence continues from its slot (from
        zero if it has no past) and leaves its state there.
        """
        if state is not None and layout.rows is not None and not layout.decodes and type(self.in_proj) is Linear:
            y_TD = self._wanted(x_TD, layout, state, layer)
        elif state is None and layout.exchange is ALONE:
            row = (self.in_proj(x_TD), *self._weights(), layout.segments, *self._settings())
            y_TD = layout.wanted(ops.mamba_layer(*row))
        else:
            y_TD = layout.wanted(self._mixed(self.in_proj(x_TD), layout, state, layer))
        return self.out_proj(y_TD) if len(y_TD) else x_TD[:0]

    def _mixed(self, z_TK: Tensor, layout: Layout, state: State | None, layer: int) -> Tensor:
        count, parts = layout.decodes, []
        if count:
            assert state is not None, "sequences decode only with a state"
            parts.append(self._step(z_TK[:count], layout, state, layer))
        if layout.segments.tokens > count:
            gate_TD, xbc_TI, dt_TH = mamba.parts(z_TK[count:], self.conv_weight, self.norm_weight)
            y_TD = self._scan(xbc_TI, dt_TH, layout, state, layer)
            parts.append(ops.gated_norm(y_TD, gate_TD, self.norm_weight, *self._settings()[:2]))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _wanted(self, x_TD: Tensor, layout: Layout, state: State, layer: int) -> Tensor:
        """What goes into `out_proj`, of the rows that are wanted: the gate of no other row is computed."""
        weight, bias, inner = self.in_proj.weight, self.in_proj.bias, len(self.norm_weight)
        own, rest = (None, None) if bias is None else (bias[:inner], bias[inner:])
        xbc_TI, dt_TH = ops.linear(x_TD, weight[inner:], rest).split([len(self.conv_weight), len(self.A_log)], dim=-1)
        y_TD = self._scan(xbc_TI, dt_TH, layout, state, layer)
        gate_TD = ops.linear(layout.wanted(x_TD), weight[:inner], own)
        return ops.gated_norm(layout.wanted(y_TD), gate_TD, self.norm_weight, *self._settings()[:2])

    def _weights(self) -> tuple[Tensor | None, ...]:
        return self.conv_weight, self.conv_bias, self.dt_bias, -self.A_log.exp(), self.D, self.norm_weight

    def _settings(self) -> tuple[int, float, tuple[float, float]]:
        return self.config.n_groups, self.config.norm_eps, self.config.time_step_limit

    def _step(self, z_SK: Tensor, layout: Layout, state: State, layer: int) -> Tensor:
        assert layout.slots is not None
        more = {}
        if state.ssm[layer].dtype == torch.float16:
            # Of the position and the layer: neither slot nor batch mates change how a state is rounded.
            more = {"seed": layout.key_counts()[: layout.decodes] * 4096 + layer}
        return ops.mamba_step(
            z_SK, *self._weights(), state.conv[layer], state.ssm[layer], layout.slots[: layout.decodes],
            *self._settings(), **more,
        )  # fmt: skip

    def _scan(self, xbc_TI: Tensor, dt_TH: Tensor, layout: Layout, state: State | None, layer: int) -> Tensor:
        rest, dt_TH = layout.others(), ops.step_size(dt_TH, self.dt_bias, self.config.time_step_limit)
        tail, initial, slots_S = None, None, None
        if state is not None:
            assert layout.slots is not None, "a state with Mamba-2 layers needs slots"
            slots_S = layout.slots[layout.decodes :]
            if any(layout.past[layout.decodes :]):
                # Filled, not multiplied: what another sequence left in the slot may be infinite.
                fresh_S = layout.fresh()
                tail = state.conv[layer][slots_S].masked_fill_(fresh_S[:, None, None], 0)
                held = state.ssm[layer][slots_S]
                held = held.float() if held.dtype == torch.float16 else held
                initial = held.masked_fill_(fresh_S[:, None, None, None], 0)
        else:
            tail = layout.exchange.halo(xbc_TI, self.config.conv_kernel - 1, rest.count)
        xbc_TI, tail = ops.conv(xbc_TI, self.conv_weight, self.conv_bias, rest, tail)
        x_THP, b_TGN, c_TGN = mamba.heads(xbc_TI, len(self.A_log), len(self.norm_weight), self.config.n_groups)
        a_H = -self.A_log.exp()
        if state is None:
            initial = layout.exchange.state(x_THP, dt_TH, a_H, b_TGN, rest.count)
        y_THP, final, _ = ops.ssd(x_THP, dt_TH, a_H, b_TGN, c_TGN, self.D, rest, initial)
        if state is not None and slots_S is not None:
            state.conv[layer][slots_S] = tail.to(state.conv[layer].dtype)
            kind = state.ssm[layer].dtype
            final = final.clamp(-65504.0, 65504.0) if kind == torch.float16 else final
            state.ssm[layer][slots_S] = final.to(kind)
        return y_THP.flatten(1)
