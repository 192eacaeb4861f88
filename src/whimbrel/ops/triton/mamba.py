"""One token of many sequences through a Mamba-2 layer between its projections, in one kernel: convolution, step sizes,
recurrence, gated norm inside each group.

A (sequence, group) is shared by a few programs, so that one sequence alone fills a GPU too: each takes some blocks of
the group's heads, and leaves y * silu(z) in float32. The one that comes last (a counter says so) divides by the root of
the mean square and moves the tail of the convolution on, which nobody reads any more then. Each state is read once and
written once. S sequences, H heads, P head width, N state size, G groups, I = HP + 2GN channels of the convolution, W its
width, Q = HP / G.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.ops.torch.mamba import heads, parts
from whimbrel.ops.triton.conv import conv_step
from whimbrel.ops.triton.gated import gated_norm
from whimbrel.ops.triton.launch import cdiv, fits, power, settings
from whimbrel.ops.triton.step import _softplus, _to_half, ssd_step

WIDEST = 16384
"""Channels of a group at most: its mean square is taken in registers."""
_counters: dict[tuple[torch.device, int], Tensor] = {}
"""Device and size -> counters of programs that are done, all zero between launches; recorded graphs hold on to them. All
launches share them, so those of two streams must not run side by side (nothing here uses two)."""


@triton.jit
def _mixed(row, taps, bias, tail, col, inside, channel_stride, place_stride, W: tl.constexpr, BIAS: tl.constexpr):
    """Channels `col` of one sequence after convolution and SiLU."""
    new = tl.load(row + col, mask=inside, other=0.0).to(tl.float32)
    total = new * tl.load(taps + col * W + (W - 1), mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(W - 1):
        old = tl.load(tail + col * channel_stride + k * place_stride, mask=inside, other=0.0).to(tl.float32)
        total += old * tl.load(taps + col * W + k, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + col, mask=inside, other=0.0).to(tl.float32)
    return total * tl.sigmoid(total)


@triton.jit
def _move_on(row, tail, col, inside, channel_stride, place_stride, W: tl.constexpr):
    """Drop the oldest input of channels `col` and keep the newest."""
    place = tail + col * channel_stride
    for k in tl.static_range(W - 2):
        old = tl.load(place + (k + 1) * place_stride, mask=inside, other=0.0)
        tl.store(place + k * place_stride, old, mask=inside)
    if W > 1:
        new = tl.load(row + col, mask=inside, other=0.0)
        tl.store(place + (W - 2) * place_stride, new.to(tail.dtype.element_ty), mask=inside)


@triton.jit
def _layer(
    z, taps, bias, dt_bias, a, d, norm, tail, state, slots, seed, gated, done, out, parts, per,
    row_stride, slot_stride, channel_stride, place_stride, eps, low, high,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr,
    HALF: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    part, g, s = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    SHARED: tl.constexpr = H // G
    BLOCKS: tl.constexpr = (P + BP - 1) // BP
    slot = tl.load(slots + s).to(tl.int64)
    row, tails = z + s * row_stride, tail + slot * slot_stride
    inputs = row + H * P
    n = tl.arange(0, BN)
    b_col, c_col = H * P + g * N + n, H * P + (G + g) * N + n
    bs = _mixed(inputs, taps, bias, tails, b_col, n < N, channel_stride, place_stride, W, BIAS)
    cs = _mixed(inputs, taps, bias, tails, c_col, n < N, channel_stride, place_stride, W, BIAS)
    for unit in range(part * per, tl.minimum((part + 1) * per, SHARED * BLOCKS)):
        h, p = g * SHARED + unit // BLOCKS, (unit % BLOCKS) * BP + tl.arange(0, BP)
        col = h * P + p
        xs = _mixed(inputs, taps, bias, tails, col, p < P, channel_stride, place_stride, W, BIAS)
        step = tl.load(inputs + (H * P + 2 * G * N) + h).to(tl.float32) + tl.load(dt_bias + h).to(tl.float32)
        step = tl.minimum(tl.maximum(_softplus(step), low), high)
        fade = tl.exp(step * tl.load(a + h).to(tl.float32))
        inside = (p < P)[:, None] & (n < N)[None, :]
        within = col[:, None] * N + n[None, :]
        place = state + slot * (H * P * N) + within
        new = tl.load(place, mask=inside, other=0.0).to(tl.float32) * fade + (xs * step)[:, None] * bs[None, :]
        if HALF:
            new = _to_half(new, tl.randint(tl.load(seed + s), within.to(tl.int32)))
            new = tl.minimum(tl.maximum(new, -65504.0), 65504.0)
        tl.store(place, new.to(state.dtype.element_ty), mask=inside)
        y = tl.sum(new * cs[None, :], 1) + tl.load(d + h).to(tl.float32) * xs
        gate = tl.load(row + col, mask=p < P, other=0.0).to(tl.float32)
        tl.store(gated + s * (H * P) + col, y * gate * tl.sigmoid(gate), mask=p < P)
    tl.debug_barrier()  # all threads have stored before the counter says so
    if tl.atomic_add(done + s * G + g, 1, sem="acq_rel") == parts - 1:
        q = tl.arange(0, BQ)
        inside = q < SHARED * P
        col = g * (SHARED * P) + q
        v = tl.load(gated + s * (H * P) + col, mask=inside, other=0.0, cache_modifier=".cg")
        r = 1.0 / tl.sqrt(tl.sum(v * v, 0) / (SHARED * P) + eps)
        w = tl.load(norm + col, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + s * (H * P) + col, (v * r * w).to(out.dtype.element_ty), mask=inside)
        _move_on(inputs, tails, col, inside, channel_stride, place_stride, W)
        _move_on(inputs, tails, b_col, n < N, channel_stride, place_stride, W)
        _move_on(inputs, tails, c_col, n < N, channel_stride, place_stride, W)
        tl.store(done + s * G + g, 0)


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
    seed: Tensor | None = None,
) -> Tensor:
    """As `ops.torch.mamba_step`, in one kernel; in three where a group is wider than `WIDEST` or a dtype is not ours."""
    (channels, taps), count, inner = conv_IW.shape, len(a_H), len(norm_D)
    width, size = inner // count, (channels - inner) // (2 * groups)
    half = state.dtype == torch.float16
    fit = fits(z_SK, conv_IW, conv_bias_I, dt_bias_H, a_H, d_H, norm_D, tail) and (half or state.dtype == torch.float32)
    if not fit or inner // groups > WIDEST or not 0 < z_SK.shape[0] <= 65535 or z_SK.stride(-1) != 1:
        return _in_three(z_SK, conv_IW, conv_bias_I, dt_bias_H, a_H, d_H, norm_D, tail, state, slots_S, groups, eps,
                         limit, seed)  # fmt: skip
    assert state.is_contiguous(), "a state is advanced where it lies"
    assert seed is not None or not half, "a float16 state is rounded at random: give a seed"
    sequences, device = z_SK.shape[0], z_SK.device
    chosen = settings("mamba_step", P=width, N=size)
    block = min(chosen["width"], power(width))
    units = count // groups * cdiv(width, block)
    per = cdiv(units, min(units, cdiv(chosen["programs"], sequences * groups)))
    key = device, power(sequences * groups, 4096)
    if key not in _counters:
        _counters[key] = torch.zeros(key[1], dtype=torch.int32, device=device)
    gated = torch.empty(sequences, inner, dtype=torch.float32, device=device)
    y_SD = torch.empty(sequences, inner, dtype=z_SK.dtype, device=device)
    _layer[(cdiv(units, per), groups, sequences)](
        z_SK, conv_IW.contiguous(), conv_IW if conv_bias_I is None else conv_bias_I, dt_bias_H, a_H, d_H,
        norm_D, tail, state, slots_S, slots_S if seed is None else seed, gated, _counters[key], y_SD, cdiv(units, per), per,
        z_SK.stride(0), *tail.stride(), eps, *limit,
        H=count, P=width, N=size, G=groups, W=taps, BIAS=conv_bias_I is not None, HALF=half,
        BP=block, BN=power(size), BQ=power(inner // groups), num_warps=chosen["num_warps"],
    )  # fmt: skip
    return y_SD


def _in_three(
    z_SK: Tensor, conv_IW: Tensor, conv_bias_I: Tensor | None, dt_bias_H: Tensor, a_H: Tensor, d_H: Tensor,
    norm_D: Tensor, tail: Tensor, state: Tensor, slots_S: Tensor, groups: int, eps: float,
    limit: tuple[float, float], seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same by a kernel for each part."""
    gate_SD, mixed_SI, dt_SH = parts(z_SK, conv_IW, norm_D)
    x, b, c = heads(conv_step(mixed_SI, conv_IW, conv_bias_I, tail, slots_S), len(a_H), len(norm_D), groups)
    y_SHP = ssd_step(x, dt_SH, a_H, b, c, d_H, state, slots_S, dt_bias_H, limit, seed)
    return gated_norm(y_SHP.flatten(1), gate_SD, norm_D, groups, eps)
