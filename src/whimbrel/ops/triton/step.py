"""One token of many sequences through the recurrence: each state is read once and written once, in float32 arithmetic.

A state may be kept in float16; it is then rounded up or down at random in proportion (stochastic rounding), since
rounding to the nearest would drop every update that is less than half a step of the old value. S sequences, H heads,
P head width, N state size, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.ops import torch as vectorised
from whimbrel.ops.triton.launch import cdiv, fits, power, settings


@triton.jit
def _to_half(v, random):
    """float32 -> float16, up or down at random: 13 random bits are added below the last that float16 keeps."""
    bits = v.to(tl.int32, bitcast=True) + (random & 0x1FFF).to(tl.int32)
    return (bits & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _softplus(v):
    """log(1 + exp v), exact where exp v is far below 1."""
    e = tl.exp(-tl.abs(v))
    near = 1.0 + e
    return tl.maximum(v, 0.0) + tl.where(near == 1.0, e, tl.log(near) * e / tl.where(near == 1.0, 1.0, near - 1.0))


@triton.jit
def _step(
    x, dt, bias, a, b, c, d, state, slots, y, seed, low, high, x_stride, dt_stride, b_stride, c_stride,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SHARED: tl.constexpr, SOFTPLUS: tl.constexpr, HALF: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    h, s = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n = tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, BN)
    step = tl.load(dt + s * dt_stride + h).to(tl.float32)
    if SOFTPLUS:
        step = tl.minimum(tl.maximum(_softplus(step + tl.load(bias + h).to(tl.float32)), low), high)
    fade = tl.exp(step * tl.load(a + h).to(tl.float32))
    xs = tl.load(x + s * x_stride + h * P + p, mask=p < P, other=0.0).to(tl.float32)
    g = h // SHARED
    bs = tl.load(b + s * b_stride + g * N + n, mask=n < N, other=0.0).to(tl.float32)
    cs = tl.load(c + s * c_stride + g * N + n, mask=n < N, other=0.0).to(tl.float32)
    inside = (p < P)[:, None] & (n < N)[None, :]
    slot = tl.load(slots + s).to(tl.int64)
    place = (slot * H + h) * (P * N) + p[:, None] * N + n[None, :]
    new = tl.load(state + place, mask=inside, other=0.0).to(tl.float32) * fade + (xs * step)[:, None] * bs[None, :]
    if HALF:
        new = _to_half(new, tl.randint(tl.load(seed + s), ((h * P + p)[:, None] * N + n[None, :]).to(tl.int32)))
        new = tl.minimum(tl.maximum(new, -65504.0), 65504.0)
    tl.store(state + place, new.to(state.dtype.element_ty), mask=inside)
    out = tl.sum(new * cs[None, :], 1) + tl.load(d + h).to(tl.float32) * xs
    tl.store(y + s * (H * P) + h * P + p, out.to(y.dtype.element_ty), mask=p < P)


def _dense(v: Tensor) -> Tensor:
    """A tensor [S, K, W] whose rows may lie apart, but whose numbers within a row are neighbours."""
    return v if v.stride(-1) == 1 and v.stride(-2) == v.shape[-1] else v.contiguous()


def ssd_step(
    x_SHP: Tensor,
    dt_SH: Tensor,
    a_H: Tensor,
    b_SGN: Tensor,
    c_SGN: Tensor,
    d_H: Tensor,
    state: Tensor,
    slots_S: Tensor,
    bias_H: Tensor | None = None,
    limit: tuple[float, float] = (0.0, float("inf")),
    seed: Tensor | None = None,
) -> Tensor:
    """As `ops.torch.ssd_step`. With `bias_H` the step sizes are still to be made of `dt_SH`, as in `step_size`.

    A float16 state needs a `seed` [S] int64 on the device, other ones for every call.
    """
    half = state.dtype == torch.float16
    fit = fits(x_SHP, dt_SH, a_H, b_SGN, c_SGN, d_H, bias_H) and (half or state.dtype == torch.float32)
    if not fit or x_SHP.shape[0] > 65535:
        dt_SH = dt_SH if bias_H is None else vectorised.step_size(dt_SH, bias_H, limit)
        return vectorised.ssd_step(x_SHP, dt_SH, a_H, b_SGN, c_SGN, d_H, state, slots_S, seed)
    assert state.is_contiguous(), "a state is advanced where it lies"
    assert seed is not None or not half, "a float16 state is rounded at random: give a seed"
    sequences, heads, width = x_SHP.shape
    groups, size = b_SGN.shape[1:]
    x, b, c = _dense(x_SHP), _dense(b_SGN), _dense(c_SGN)
    dt = dt_SH if dt_SH.stride(-1) == 1 else dt_SH.contiguous()
    chosen = settings("ssd_step", P=width, N=size)
    block = min(chosen["width"], power(width))
    y_SHP = torch.empty(sequences, heads, width, dtype=x_SHP.dtype, device=x_SHP.device)
    if sequences:
        _step[(cdiv(width, block), heads, sequences)](
            x, dt, a_H if bias_H is None else bias_H, a_H, b, c, d_H, state, slots_S, y_SHP,
            slots_S if seed is None else seed, *limit, x.stride(0), dt.stride(0), b.stride(0), c.stride(0),
            H=heads, P=width, N=size, SHARED=heads // groups, SOFTPLUS=bias_H is not None, HALF=half,
            BP=block, BN=power(size), num_warps=chosen["num_warps"],
        )  # fmt: skip
    return y_SHP
