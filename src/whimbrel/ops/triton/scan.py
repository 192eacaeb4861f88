"""The Mamba-2 scan on a GPU (arXiv 2405.21060, section 6), forward and backward.

Tokens are cut into pieces, which run side by side, and pieces into chunks, which one program walks through with the
state in its registers (float32). So a state goes through memory once a piece, not once a chunk:

    forward    1 `_walk`: what each piece adds to a state of zero; 2 `_pass`: states before pieces, one sequence after
               another; 3 `_read`: each piece from its state, y and the states asked for. With one piece a sequence, 3 alone.
    backward   1 and 2 the same from the other end, for the gradients of the states; then `_walk` writes the state before
               and the gradient after each chunk (in the dtype of x: they go into matrix products), and `_reading`, then
               `_writing` take a chunk and a group of heads at a time: heads share B and C, so sums over heads stay in
               registers. Two kernels, since one would need more registers than there are.

With cs the running sum of dt a inside a chunk, L_ij = exp(cs_i - cs_j) for i >= j, S0 the state before it:
    y_i = sum_j (C_i.B_j) L_ij dt_j x_j + exp(cs_i) S0 C_i + D x_i      S1 = exp(cs_end) S0 + sum_j exp(cs_end - cs_j) dt_j x_j B_j'
Exponents are never positive. With Q_ij the product of a score (C_i.B_j) L_ij dt_j and its gradient, the gradient of cs_i is
sum_j (Q_ij - Q_ji) + exp(cs_i) dy_i.S0 C_i - exp(cs_end - cs_i) dt_i x_i.dS1 B_i. Both sums are of the same rounded numbers:
they cancel exactly where they must. The gradient of a sums these over all tokens and nearly cancels itself, and half its error in
bfloat16 came of S0, rounded for dy_i.S0 C_i: `_walk` has it in float32 and writes what rounding takes from each such number.

T tokens, S sequences, H heads, P head width, N state size, G groups, n pieces, m chunks, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.ops import torch as vectorised
from whimbrel.ops.segments import Segments
from whimbrel.ops.triton.cuts import Cuts, cut
from whimbrel.ops.triton.launch import cdiv, fits, power, settings


@triton.jit
def _walk(
    x, dt, a, b, dy, c, start, store, lost, end, fade, begins, chunks, tokens, x_stride, b_stride, dy_stride, c_stride,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SHARED: tl.constexpr, C: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    REVERSE: tl.constexpr, STARTED: tl.constexpr, STORE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Carry a state [N, P] through the chunks of a piece, from zero or from `start`.

    Forward it gathers dt_j exp(cs_end - cs_j) B_j x_j' of x and B; in reverse exp(cs_i) C_i dy_i' of dy and C. Before each
    chunk it may store the state, and going forward `lost`, exp(cs_i) dy_i.R C_i [P / BP, H, T] of what rounding took from
    it, R; at the end it writes the state, and the decay over the whole piece.
    """
    h, piece = tl.program_id(0) % H, tl.program_id(1)
    p, n = (tl.program_id(0) // H * BP if P > BP else 0) + tl.arange(0, BP), tl.arange(0, BN)
    begin, stop = tl.load(begins + piece), tl.load(begins + piece + 1)
    rate = tl.load(a + h)
    inside = (n < N)[:, None] & (p < P)[None, :]
    place = h * (P * N) + p[None, :] * N + n[:, None]
    wide: tl.constexpr = H * P * N
    state = tl.zeros([BN, BP], tl.float32)
    if STARTED:
        state = tl.load(start + piece.to(tl.int64) * wide + place, mask=inside, other=0.0)
    first = tl.load(chunks + piece).to(tl.int64)
    count = tl.cdiv(stop - begin, C)
    whole = 0.0
    for k in range(0, count):
        chunk = count - 1 - k if REVERSE else k
        if STORE:
            rounded = state.to(store.dtype.element_ty)
            tl.store(store + (first + chunk) * wide + place, rounded, mask=inside)
        i = begin + chunk * C + tl.arange(0, C)
        real = i < stop
        steps = tl.load(dt + h.to(tl.int64) * tokens + i, mask=real, other=0.0)
        cs = tl.cumsum(steps * rate, 0)
        total = tl.sum(steps * rate, 0)
        at = i.to(tl.int64)
        if STORE and not REVERSE and store.dtype.element_ty != tl.float32:
            up = tl.load(
                dy + at[:, None] * dy_stride + h * P + p[None, :], mask=real[:, None] & (p < P)[None, :], other=0.0
            )
            reads = tl.load(
                c + at[:, None] * c_stride + (h // SHARED) * N + n[None, :],
                mask=real[:, None] & (n < N)[None, :],
                other=0.0,
            )
            rest = tl.dot(reads, (state - rounded.to(tl.float32)).to(reads.dtype), input_precision=DOT)
            rest = tl.sum(rest * up.to(tl.float32), 1) * tl.exp(cs)
            tl.store(lost + tl.program_id(0).to(tl.int64) * tokens + i, rest, mask=real)
        xs = tl.load(x + at[:, None] * x_stride + h * P + p[None, :], mask=real[:, None] & (p < P)[None, :], other=0.0)
        bs = tl.load(
            b + at[:, None] * b_stride + (h // SHARED) * N + n[None, :],
            mask=real[:, None] & (n < N)[None, :],
            other=0.0,
        )
        weight = tl.exp(cs) if REVERSE else tl.exp(total - cs) * steps
        weighted = (xs.to(tl.float32) * weight[:, None]).to(xs.dtype)
        state = tl.dot(tl.trans(bs), weighted, state * tl.exp(total), input_precision=DOT)
        whole += total
    tl.store(end + piece.to(tl.int64) * wide + place, state, mask=inside)
    if tl.program_id(0) < H:
        tl.store(fade + piece * H + h, tl.exp(whole))


@triton.jit
def _pass(
    gain, fade, begin, row_states, between, out, first, rows,
    H: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, STARTED: tl.constexpr,
):  # fmt: skip
    """From piece to piece of a sequence: `between` gets the carried value before each is passed, `out` the last one.

    In reverse the carried value is a gradient, to which the gradients of the states that were asked for are added.
    """
    h, s = tl.program_id(1), tl.program_id(2)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    carry = tl.zeros([BLOCK], tl.float32)
    if STARTED:
        carry = tl.load(begin + (s.to(tl.int64) * H + h) * SIZE + i, mask=inside, other=0.0)
    low, high = tl.load(first + s), tl.load(first + s + 1)
    for k in range(0, high - low):
        piece = high - 1 - k if REVERSE else low + k
        at = (piece.to(tl.int64) * H + h) * SIZE + i
        if REVERSE:
            row = tl.load(rows + piece)
            kept = i < tl.where(row >= 0, SIZE, 0)
            carry += tl.load(row_states + (row.to(tl.int64) * H + h) * SIZE + i, mask=kept, other=0.0)
        tl.store(between + at, carry, mask=inside)
        carry = carry * tl.load(fade + piece * H + h) + tl.load(gain + at, mask=inside, other=0.0)
    tl.store(out + (s.to(tl.int64) * H + h) * SIZE + i, carry, mask=inside)


@triton.jit
def _read(
    x, dt, a, b, c, d, start, y, states, begins, rows, tokens, x_stride, b_stride, c_stride,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SHARED: tl.constexpr, C: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    STARTED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """y of a piece, and the state after it where it is wanted."""
    h, piece = tl.program_id(0) % H, tl.program_id(1)
    p, n, j = (tl.program_id(0) // H * BP if P > BP else 0) + tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, C)
    begin, stop = tl.load(begins + piece), tl.load(begins + piece + 1)
    rate, skip = tl.load(a + h), tl.load(d + h)
    inside = (n < N)[:, None] & (p < P)[None, :]
    place = h * (P * N) + p[None, :] * N + n[:, None]
    wide: tl.constexpr = H * P * N
    state = tl.zeros([BN, BP], tl.float32)
    if STARTED:
        state = tl.load(start + piece.to(tl.int64) * wide + place, mask=inside, other=0.0)
    # Whole numbers of 32 bits from here on: a piece is short.
    first, length, group = begin.to(tl.int64), stop - begin, (h // SHARED) * N
    x += first * x_stride + h * P
    b += first * b_stride + group
    c += first * c_stride + group
    y += first * (H * P) + h * P
    dt += h.to(tl.int64) * tokens + first
    for at in range(0, length, C):
        i = at + j
        real = i < length
        steps = tl.load(dt + i, mask=real, other=0.0)
        cs = tl.cumsum(steps * rate, 0)
        total = tl.sum(steps * rate, 0)
        mask, columns = real[:, None] & (p < P)[None, :], real[:, None] & (n < N)[None, :]
        xs = tl.load(x + i[:, None] * x_stride + p[None, :], mask=mask, other=0.0)
        bs = tl.load(b + i[:, None] * b_stride + n[None, :], mask=columns, other=0.0)
        reads = tl.load(c + i[:, None] * c_stride + n[None, :], mask=columns, other=0.0)
        old = state.to(xs.dtype)
        weighted = (xs.to(tl.float32) * (tl.exp(total - cs) * steps)[:, None]).to(xs.dtype)
        state = tl.dot(tl.trans(bs), weighted, state * tl.exp(total), input_precision=DOT)  # first: fewer registers
        out = tl.dot(reads, old, input_precision=DOT) * tl.exp(cs)[:, None] + skip * xs.to(tl.float32)
        scores = tl.dot(reads, tl.trans(bs), input_precision=DOT)
        scores *= tl.exp(tl.where(i[:, None] >= i[None, :], cs[:, None] - cs[None, :], float("-inf"))) * steps[None, :]
        out = tl.dot(scores.to(xs.dtype), xs, out, input_precision=DOT)
        tl.store(y + i[:, None] * (H * P) + p[None, :], out.to(y.dtype.element_ty), mask=mask)
    row = tl.load(rows + piece)
    if row >= 0:
        tl.store(states + row.to(tl.int64) * wide + place, state, mask=inside)


@triton.jit
def _reading(
    x, dt, a, b, c, dy, before, dc, dproducts, reads, begins, ends, tokens, x_stride, b_stride, c_stride, dy_stride,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SHARED: tl.constexpr, G: tl.constexpr,
    C: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dC of a chunk and a group; the gradient of C B' there, summed over heads; and the gradient of cs of each head [H, T]
    as far as it does not come from the state after the chunk.
    """
    g, chunk = tl.program_id(0), tl.program_id(1)
    p, n, j = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, C)
    i = tl.load(begins + chunk) + j
    real = i < tl.load(ends + chunk)
    far = i.to(tl.int64)[:, None]
    columns = real[:, None] & (n < N)[None, :]
    bs = tl.load(b + far * b_stride + g * N + n[None, :], mask=columns, other=0.0)
    cs_ = tl.load(c + far * c_stride + g * N + n[None, :], mask=columns, other=0.0)
    product = tl.where(j[:, None] >= j[None, :], tl.dot(cs_, tl.trans(bs), input_precision=DOT), 0.0)
    dproduct = tl.zeros([C, C], tl.float32)
    dreads = tl.zeros([C, BN], tl.float32)
    mask = real[:, None] & (p < P)[None, :]
    for k in range(0, SHARED):
        h = g * SHARED + k
        rate = tl.load(a + h)
        steps = tl.load(dt + h.to(tl.int64) * tokens + i, mask=real, other=0.0)
        cs = tl.cumsum(steps * rate, 0)
        xs = tl.load(x + far * x_stride + h * P + p[None, :], mask=mask, other=0.0)
        up = tl.load(dy + far * dy_stride + h * P + p[None, :], mask=mask, other=0.0)
        place = (chunk.to(tl.int64) * H + h) * (P * N) + p[:, None] * N + n[None, :]
        old = tl.load(before + place, mask=(p < P)[:, None] & (n < N)[None, :], other=0.0)
        pairs = tl.dot(up, tl.trans(xs), input_precision=DOT)
        pairs *= tl.exp(tl.minimum(cs[:, None] - cs[None, :], 0.0)) * steps[None, :]
        dproduct += pairs
        reached = tl.dot(up, old, input_precision=DOT) * tl.exp(cs)[:, None]
        dreads += reached
        pairs *= product
        read = tl.sum(pairs, 1) - tl.sum(pairs, 0) + tl.sum(reached * cs_.to(tl.float32), 1)
        tl.store(reads + h.to(tl.int64) * tokens + i, read, mask=real)
    low = tl.where(j[:, None] >= j[None, :], dproduct, 0.0).to(bs.dtype)
    dreads = tl.dot(low, bs, dreads, input_precision=DOT)
    tl.store(dc + far * (G * N) + g * N + n[None, :], dreads.to(dc.dtype.element_ty), mask=columns)
    tl.store(dproducts + ((chunk.to(tl.int64) * G + g) * C + j[:, None]) * C + j[None, :], low)


@triton.jit
def _writing(
    x, dt, a, b, c, d, dy, before, after, dproducts, reads, dx, ddt, db, da, dd, begins, ends, tokens,
    x_stride, b_stride, c_stride, dy_stride,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SHARED: tl.constexpr, G: tl.constexpr,
    C: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dB of a chunk and a group; dx, ddt, and the chunk's part of the gradients of a and D, of each head."""
    g, chunk = tl.program_id(0), tl.program_id(1)
    p, n, j = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, C)
    begin = tl.load(begins + chunk)
    i, first = begin + j, begin.to(tl.int64)
    real = i < tl.load(ends + chunk)
    columns = real[:, None] & (n < N)[None, :]
    bs = tl.load(b + first * b_stride + g * N + j[:, None] * b_stride + n[None, :], mask=columns, other=0.0)
    cs_ = tl.load(c + first * c_stride + g * N + j[:, None] * c_stride + n[None, :], mask=columns, other=0.0)
    product = tl.dot(bs, tl.trans(cs_), input_precision=DOT)  # the later token is the column here
    product = tl.where(j[None, :] >= j[:, None], product, 0.0)  # here, not in each head's exponent: fewer registers
    low = tl.load(dproducts + ((chunk.to(tl.int64) * G + g) * C + j[:, None]) * C + j[None, :])
    dbs = tl.dot(tl.trans(low), cs_, input_precision=DOT)
    inside = (p < P)[:, None] & (n < N)[None, :]
    mask = real[:, None] & (p < P)[None, :]
    for k in range(0, SHARED):
        h = g * SHARED + k
        rate, skip = tl.load(a + h), tl.load(d + h)
        steps = tl.load(dt + h.to(tl.int64) * tokens + i, mask=real, other=0.0)
        cs = tl.cumsum(steps * rate, 0)
        total = tl.sum(steps * rate, 0)
        to_end = tl.exp(total - cs)
        place = (chunk.to(tl.int64) * H + h) * (P * N)
        new = tl.load(after + place + p[:, None] * N + n[None, :], mask=inside, other=0.0)
        old = tl.load(before + place + p[:, None] * N + n[None, :], mask=inside, other=0.0)
        last = tl.exp(total) * tl.sum(tl.sum(old.to(tl.float32) * new.to(tl.float32), 1), 0)
        xs = tl.load(x + first * x_stride + h * P + j[:, None] * x_stride + p[None, :], mask=mask, other=0.0)
        up = tl.load(dy + first * dy_stride + h * P + j[:, None] * dy_stride + p[None, :], mask=mask, other=0.0)
        tl.store(dd + chunk * H + h, tl.sum(tl.sum(xs.to(tl.float32) * up.to(tl.float32), 1), 0))
        weighted = (xs.to(tl.float32) * (to_end * steps)[:, None]).to(xs.dtype)
        dbs = tl.dot(weighted, new, dbs, input_precision=DOT)
        du = tl.dot(bs, tl.trans(new), input_precision=DOT) * to_end[:, None]
        wide = xs.to(tl.float32)
        pull = tl.sum(du * wide, 1) * steps
        last += tl.sum(pull, 0)
        decay = tl.exp(tl.minimum(cs[None, :] - cs[:, None], 0.0))
        du = tl.dot((product * decay).to(xs.dtype), up, du, input_precision=DOT)
        along = tl.sum(du * wide, 1)
        tl.store(
            dx + first * (H * P) + h * P + j[:, None] * (H * P) + p[None, :],
            (du * steps[:, None] + skip * up.to(tl.float32)).to(dx.dtype.element_ty),
            mask=mask,
        )
        dcs = tl.load(reads + h.to(tl.int64) * tokens + i, mask=real, other=0.0) - pull
        decays = last + tl.sum(dcs, 0) - tl.cumsum(dcs, 0) + dcs
        tl.store(ddt + h.to(tl.int64) * tokens + i, decays * rate + along, mask=real)
        tl.store(da + chunk * H + h, tl.sum(decays * steps, 0))
    tl.store(
        db + first * (G * N) + g * N + j[:, None] * (G * N) + n[None, :], dbs.to(db.dtype.element_ty), mask=columns
    )


class _Shape:
    """Sizes, blocks and the grid of one call."""

    def __init__(self, x_THP: Tensor, b_TGN: Tensor, longest: int) -> None:
        (self.tokens, self.heads, self.width), (self.groups, self.size) = x_THP.shape, b_TGN.shape[1:]
        chosen = settings("scan", P=self.width, N=self.size)
        walk = settings("scan_walk", P=self.width, N=self.size)
        self.chunk = min(chosen["chunk"], power(longest, 16))
        self.piece = max(self.chunk, chosen["piece"] // self.chunk * self.chunk)
        self.read = {"num_warps": chosen["num_warps"], "num_stages": chosen["num_stages"]}
        self.walk = {"num_warps": walk["num_warps"], "num_stages": walk["num_stages"]}
        self.exact = "tf32x3" if x_THP.dtype == torch.float32 else "tf32"  # of bfloat16 products are exact either way
        self.block = min(chosen.get("width", 128), power(self.width, 16))
        self.sizes = {
            "H": self.heads,
            "P": self.width,
            "N": self.size,
            "SHARED": self.heads // self.groups,
            "C": self.chunk,
            "BN": power(self.size, 16),
            "DOT": self.exact,
        }

    @property
    def programs(self) -> int:
        """Programs of a piece."""
        return self.heads * cdiv(self.width, self.block)

    def empty(self, count: int, dtype: torch.dtype, like: Tensor) -> Tensor:
        """[count, H, P, N]."""
        return torch.empty(count, self.heads, self.width, self.size, dtype=dtype, device=like.device)


def _between(
    shape: _Shape, cuts: Cuts, row: Sequence[Tensor], start: Tensor | None, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What is carried into each piece [n, H, P, N], and out of each sequence [S, H, P, N].

    Of states with `start`, from the first piece on; of gradients with `ends`, from the last piece back.
    """
    x, dt, a, b = row
    reverse, count = ends is not None, len(cuts.starts) - 1
    gain, fade = shape.empty(cuts.pieces, torch.float32, x), x.new_empty(cuts.pieces, shape.heads, dtype=torch.float32)
    _walk[(shape.programs, cuts.pieces)](
        x, dt, a, b, x, b, gain, gain, fade, gain, fade, cuts.begins, cuts.chunks, shape.tokens, x.stride(0), b.stride(0), 0, 0,
        **shape.sizes, **shape.walk, BP=shape.block, REVERSE=reverse, STARTED=False, STORE=False,
    )  # fmt: skip
    between, out = torch.empty_like(gain), shape.empty(count, torch.float32, x)
    size, block = shape.width * shape.size, 1024
    _pass[(cdiv(size, block), shape.heads, count)](
        gain, fade, gain if start is None else start, gain if ends is None else ends, between, out, cuts.first, cuts.rows,
        H=shape.heads, SIZE=size, BLOCK=block, REVERSE=reverse, STARTED=start is not None, num_warps=4,
    )  # fmt: skip
    return between, out


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt_HT: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        initial: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        """y_THP, and the states asked for: after each sequence, then after each kept token."""
        segments, keep, shape = rest
        cuts = cut(segments.lengths, keep, shape.piece, shape.chunk, x.device)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        states = shape.empty(segments.count + len(set(keep)), torch.float32, x)
        if cuts.single:
            start = initial if initial is None or not cuts.empty else initial[cuts.sequence]
        else:
            start, _ = _between(shape, cuts, (x, dt_HT, a, b), initial, None)
        _read[(shape.programs, cuts.pieces)](
            x, dt_HT, a, b, c, d, x if start is None else start, y, states, cuts.begins, cuts.rows, shape.tokens,
            x.stride(0), b.stride(0), c.stride(0), **shape.sizes, **shape.read, BP=shape.block, STARTED=start is not None,
        )  # fmt: skip
        if cuts.empty:
            states[list(cuts.empty)] = 0.0 if initial is None else initial[list(cuts.empty)]
        ctx.save_for_backward(x, dt_HT, a, b, c, d, initial, start)
        ctx.cuts, ctx.shape = cuts, shape
        ctx.set_materialize_grads(False)
        return y, states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, a, b, c, d, initial, start = ctx.saved_tensors
        cuts, shape = ctx.cuts, ctx.shape
        dy, dstates = gradients
        dy = torch.zeros_like(x) if dy is None else _dense(dy)
        rows = len(cuts.starts) - 1 + len(set(cuts.kept))
        dstates = (
            x.new_zeros(rows, *x.shape[1:], shape.size, dtype=torch.float32)
            if dstates is None
            else dstates.contiguous()
        )
        into, dinitial = _between(shape, cuts, (dy, dt, a, c), None, dstates)
        before, after = (shape.empty(cuts.count, x.dtype, x) for _ in range(2))
        unused, fade = torch.empty_like(into), x.new_empty(cuts.pieces, shape.heads, dtype=torch.float32)
        parts = 0 if x.dtype == torch.float32 else shape.programs // shape.heads
        lost = x.new_empty(parts, shape.heads, shape.tokens, dtype=torch.float32)
        for side, by, state, store, reverse in ((x, b, start, before, False), (dy, c, into, after, True)):
            _walk[(shape.programs, cuts.pieces)](
                side, dt, a, by, dy, c, unused if state is None else state, store, lost, unused, fade, cuts.begins, cuts.chunks,
                shape.tokens, side.stride(0), by.stride(0), dy.stride(0), c.stride(0), **shape.sizes, **shape.walk,
                BP=shape.block, REVERSE=reverse, STARTED=state is not None, STORE=True,
            )  # fmt: skip
        dx, ddt = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(dt)
        db, dc = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (b, c))
        da, dd = (x.new_empty(cuts.count, shape.heads, dtype=torch.float32) for _ in range(2))
        reads = torch.empty_like(dt)
        low = torch.empty(cuts.count, shape.groups, shape.chunk, shape.chunk, dtype=x.dtype, device=x.device)
        grid, blocks = (shape.groups, cuts.count), {"G": shape.groups, "BP": power(shape.width, 16)}
        ends = (cuts.chunk_begins, cuts.chunk_ends, shape.tokens, x.stride(0), b.stride(0), c.stride(0), dy.stride(0))
        launches = [settings(name, P=shape.width, N=shape.size) for name in ("scan_reading", "scan_writing")]
        _reading[grid](x, dt, a, b, c, dy, before, dc, low, reads, *ends, **shape.sizes, **blocks, **launches[0])
        for part in lost:
            reads += part
        _writing[grid](
            x, dt, a, b, c, d, dy, before, after, low, reads, dx, ddt, db, da, dd, *ends,
            **shape.sizes, **blocks, **launches[1],
        )  # fmt: skip
        if cuts.empty:
            dinitial[list(cuts.empty)] = dstates[list(cuts.empty)]
        return dx, ddt, da.sum(0), db, dc, dd.sum(0), None if initial is None else dinitial, None, None, None


def _dense(v: Tensor) -> Tensor:
    """A tensor [T, K, W] whose tokens may lie apart, but whose numbers within a token are neighbours."""
    return v if v.stride(-1) == 1 and (v.shape[-2] == 1 or v.stride(-2) == v.shape[-1]) else v.contiguous()


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
    """As `ops.torch.ssd`: x, B and C in bfloat16 or float32; states, decays and all sums in float32."""
    row, width, size = (x_THP, dt_TH, a_H, b_TGN, c_TGN, d_H), x_THP.shape[2], b_TGN.shape[2]
    # In float32 the wider shapes need more shared memory than an H200 has.
    room = 64 * 128 if x_THP.dtype == torch.float32 else 128 * 256
    small = power(width, 16) * power(size, 16) <= room and max(width, size // 2) <= 128
    if not segments.tokens or not fits(*row, initial_SHPN) or not small:
        return vectorised.ssd(*row, segments, initial_SHPN, keep)
    x, b, c = (_dense(v.to(x_THP.dtype)) for v in (x_THP, b_TGN, c_TGN))
    dt_HT = dt_TH.float().t().contiguous()
    a, d = a_H.float().contiguous(), d_H.float().contiguous()
    initial = None if initial_SHPN is None else initial_SHPN.float().contiguous()
    shape, unique = _Shape(x, b, max(segments.lengths)), tuple(sorted(set(keep)))
    y_THP, states = _Scan.apply(x, dt_HT, a, b, c, d, initial, segments, unique, shape)
    kept = cut(segments.lengths, unique, shape.piece, shape.chunk, x.device).kept
    rows = [kept[unique.index(k)] for k in keep]
    return y_THP, states[: segments.count], states[rows] if rows else states[:0]
