"""Mamba-2 (arXiv 2405.21060, section 6) as its recurrence, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from whimbrel.ops.segments import Segments


def step_size(dt_TH: Tensor, bias_H: Tensor, limit: tuple[float, float]) -> Tensor:
    """softplus(dt + bias), clamped to `limit`. [T, H], at least float32."""
    dtype = torch.promote_types(dt_TH.dtype, torch.float32)
    return F.softplus(dt_TH.to(dtype) + bias_H.to(dtype)).clamp(*limit)


def _advance(state_HPN: Tensor, x_HP: Tensor, dt_H: Tensor, a_H: Tensor, b_GN: Tensor) -> Tensor:
    """S_t = exp(dt a) S_{t-1} + dt x B^T; H/G neighbouring heads share one B."""
    b_HN = b_GN.repeat_interleave(len(a_H) // len(b_GN), dim=0)
    decay_H11 = torch.exp(dt_H * a_H)[:, None, None]
    return decay_H11 * state_HPN + (dt_H[:, None] * x_HP)[:, :, None] * b_HN[:, None, :]


def _read(state_HPN: Tensor, x_HP: Tensor, c_GN: Tensor, d_H: Tensor) -> Tensor:
    """y_t = S_t C_t + D x_t."""
    c_HN = c_GN.repeat_interleave(len(d_H) // len(c_GN), dim=0)
    return (state_HPN * c_HN[:, None, :]).sum(-1) + d_H[:, None] * x_HP


def ssd(
    x_THP: Tensor,
    dt_TH: Tensor,
    a_H: Tensor,
    b_TGN: Tensor,
    c_TGN: Tensor,
    d_H: Tensor,
    segments: Segments,
    initial_SHPN: Tensor | None = None,
    keep: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan: y_THP, the state after each sequence [S, H, P, N], and the states after the tokens `keep` [len(keep),
    H, P, N].
    """
    heads, width, size = *x_THP.shape[1:], b_TGN.shape[2]
    outputs, finals, kept = [], [], {}
    for s, (start, end) in enumerate(zip(segments.offsets, segments.offsets[1:], strict=False)):
        state = x_THP.new_zeros(heads, width, size) if initial_SHPN is None else initial_SHPN[s]
        for t in range(start, end):
            state = _advance(state, x_THP[t], dt_TH[t], a_H, b_TGN[t])
            outputs.append(_read(state, x_THP[t], c_TGN[t], d_H))
            if t in keep:
                kept[t] = state
        finals.append(state)
    empty = x_THP.new_zeros(0, heads, width, size)
    return (
        torch.stack(outputs) if outputs else torch.zeros_like(x_THP),
        torch.stack(finals) if finals else empty,
        torch.stack([kept[t] for t in keep]) if keep else empty,
    )


def ssd_step(
    x_SHP: Tensor, dt_SH: Tensor, a_H: Tensor, b_SGN: Tensor, c_SGN: Tensor, d_H: Tensor, state: Tensor, slots_S: Tensor
) -> Tensor:
    """One token of each sequence: y_SHP; `state[slots]` is advanced in place."""
    outputs = torch.empty_like(x_SHP)
    for s, slot in enumerate(slots_S.tolist()):
        state[slot] = _advance(state[slot], x_SHP[s], dt_SH[s], a_H, b_SGN[s])
        outputs[s] = _read(state[slot], x_SHP[s], c_SGN[s], d_H)
    return outputs


def conv(
    x_TI: Tensor, weight_IW: Tensor, bias_I: Tensor | None, segments: Segments, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal depth-wise convolution and SiLU: y_TI, and the last W-1 inputs of each sequence tail_SI(W-1), oldest
    first.

    `initial` [S, I, W-1]: the inputs before the first one; zeros if None.
    """
    channels, width = weight_IW.shape
    outputs, tails = [], []
    for s, (start, end) in enumerate(zip(segments.offsets, segments.offsets[1:], strict=False)):
        window = [x_TI.new_zeros(channels) if initial is None else initial[s, :, i] for i in range(width - 1)]
        for t in range(start, end):
            window.append(x_TI[t])
            total = (weight_IW * torch.stack(window[-width:], dim=-1)).sum(-1)
            outputs.append(F.silu(total if bias_I is None else total + bias_I))
        tail = window[len(window) - (width - 1) :]
        tails.append(torch.stack(tail, dim=-1) if tail else x_TI.new_zeros(channels, 0))
    empty = x_TI.new_zeros(0, channels, width - 1)
    return torch.stack(outputs) if outputs else torch.zeros_like(x_TI), torch.stack(tails) if tails else empty


def conv_step(x_SI: Tensor, weight_IW: Tensor, bias_I: Tensor | None, tail: Tensor, slots_S: Tensor) -> Tensor:
    """One token of each sequence: y_SI; `tail[slots]` [I, W-1] is advanced in place."""
    outputs = torch.empty_like(x_SI)
    for s, slot in enumerate(slots_S.tolist()):
        one = Segments.of([1])
        outputs[s : s + 1], new_tail = conv(x_SI[s : s + 1], weight_IW, bias_I, one, tail[slot][None])
        tail[slot] = new_tail[0]
    return outputs


def gated_norm(y_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """RMSNorm(y * silu(gate)) inside each of `groups` groups of channels, then the weight: the gate comes first."""
    dtype = torch.promote_types(y_TD.dtype, torch.float32)
    gated_TD = y_TD.to(dtype) * F.silu(gate_TD.to(dtype))
    parts = []
    for part in gated_TD.chunk(groups, dim=-1):
        parts.append(part / torch.sqrt(part.pow(2).mean(-1, keepdim=True) + eps))
    return (torch.cat(parts, dim=-1) * weight_D.to(dtype)).to(y_TD.dtype)


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
) -> Tensor:
    """One token of each sequence through a layer between its projections: [z | x | B | C | dt] -> RMSNorm(y silu(z)).

    `tail[slots]` and `state[slots]` are advanced in place.
    """
    inner, heads = len(norm_D), len(a_H)
    size = (len(conv_IW) - inner) // (2 * groups)
    gate, mixed, dt = z_SK[:, :inner], z_SK[:, inner : inner + len(conv_IW)], z_SK[:, inner + len(conv_IW) :]
    mixed = conv_step(mixed, conv_IW, conv_bias_I, tail, slots_S)
    x, b, c = mixed[:, :inner], mixed[:, inner : inner + groups * size], mixed[:, inner + groups * size :]
    b, c = (v.reshape(len(z_SK), groups, size) for v in (b, c))
    dt = step_size(dt, dt_bias_H, limit)
    y = ssd_step(x.reshape(len(z_SK), heads, inner // heads), dt, a_H, b, c, d_H, state, slots_S)
    return gated_norm(y.reshape(len(z_SK), inner), gate, norm_D, groups, eps)
