"""The scan of Mamba-2 in chunks: matrix products inside a chunk, a short recurrence between chunks (arXiv 2405.21060,
section 6).

With cs the running sum of dt*a inside a chunk and u = dt*x, for tokens i >= j of one chunk:

    y_i = sum_j exp(cs_i - cs_j) (C_i . B_j) u_j  +  exp(cs_i) S_before C_i  +  D x_i
    S_after = exp(cs_last) S_before + sum_j exp(cs_last - cs_j) u_j B_j^T

Chunks never straddle two sequences (nor a token whose state is asked for), so isolation needs no masks: the last chunk
of a sequence is filled up with tokens of step size 0, which change nothing. C B^T is computed once a group, not once a
head. All exponents are of non-positive numbers, so nothing overflows. The backward pass is written out: it keeps the
inputs and one state a chunk, and recomputes what is quadratic in the chunk, so memory is linear in the length.

n chunks, C tokens of a chunk, h heads of a group; the other letters as in `ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from whimbrel.ops.segments import Segments


@dataclass(frozen=True, eq=False)
class _Grid:
    """How T tokens fall into n chunks."""

    token_nC: Tensor
    """The token at each place; T (a spare row of zeros) where a chunk is not full."""
    place_T: Tensor
    """The place n*C + i of each token."""
    sequence: tuple[int, ...]
    """The sequence of each chunk."""
    opens: tuple[bool, ...]
    """Does the sequence begin with this chunk?"""
    last: tuple[int, ...]
    """The last chunk of each sequence, -1 for an empty one."""
    kept: tuple[int, ...]
    """The chunk that ends with each token asked for."""


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve training too, whoever asks first
def _grid(lengths: tuple[int, ...], keep: tuple[int, ...], chunk: int, device: torch.device) -> _Grid:
    total = sum(lengths)
    begins: list[int] = []
    sizes: list[int] = []
    sequence: list[int] = []
    last = []
    offset = 0
    for s, length in enumerate(lengths):
        cuts = [k + 1 for k in sorted(set(keep)) if offset <= k < offset + length - 1] + [offset + length]
        begin = offset
        for cut in cuts:
            for at in range(begin, cut, chunk):
                begins.append(at)
                sizes.append(min(chunk, cut - at))
                sequence.append(s)
            begin = cut
        last.append(len(begins) - 1 if length else -1)
        offset += length
    ends = {begin + size - 1: n for n, (begin, size) in enumerate(zip(begins, sizes, strict=True))}
    inside = torch.arange(chunk)
    token_nC = torch.tensor(begins, dtype=torch.int64)[:, None] + inside
    token_nC[inside >= torch.tensor(sizes, dtype=torch.int64)[:, None]] = total
    place_T = torch.empty(total + 1, dtype=torch.int64)
    place_T[token_nC.flatten()] = torch.arange(token_nC.numel())
    opens = tuple(s != before for s, before in zip(sequence, [-1, *sequence], strict=False))
    return _Grid(
        token_nC.to(device),
        place_T[:total].to(device),
        tuple(sequence),
        opens,
        tuple(last),
        tuple(ends[k] for k in keep),
    )


def _to_chunks(x: Tensor, grid: _Grid) -> Tensor:
    """[T, ...] -> [n, C, ...] with zeros where a chunk is not full."""
    if grid.token_nC.numel() == x.shape[0]:
        return x.reshape(*grid.token_nC.shape, *x.shape[1:])
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[grid.token_nC.flatten()].reshape(
        *grid.token_nC.shape, *x.shape[1:]
    )


def _to_row(x_nC: Tensor, grid: _Grid) -> Tensor:
    """[n, C, ...] -> [T, ...]."""
    flat = x_nC.flatten(0, 1)
    return flat if flat.shape[0] == grid.place_T.shape[0] else flat[grid.place_T]


def _by_head(x_nCHP: Tensor, groups: int) -> Tensor:
    """[n, C, H, P] -> [nG, h, C, P]."""
    n, size, heads, width = x_nCHP.shape
    return (
        x_nCHP.view(n, size, groups, heads // groups, width).permute(0, 2, 3, 1, 4).reshape(n * groups, -1, size, width)
    )


def _from_head(x: Tensor, n: int) -> Tensor:
    """[nG, h, C, P] -> [n, C, H, P]."""
    groups, (shared, size, width) = x.shape[0] // n, x.shape[1:]
    return x.view(n, groups, shared, size, width).permute(0, 3, 1, 2, 4).reshape(n, size, groups * shared, width)


@dataclass(eq=False)
class _Chunks:
    """The inputs cut into chunks, and the decays between their tokens."""

    u: Tensor  # [nG, h, C, P]: dt * x
    b: Tensor  # [nG, C, N]
    c: Tensor  # [nG, C, N]
    dt: Tensor  # [n, C, H]
    x: Tensor  # [n, C, H, P]
    cs: Tensor  # [nG, h, C]: running sum of dt * a
    from_start: Tensor  # [nG, h, C]: exp(cs_i)
    to_end: Tensor  # [nG, h, C]: exp(cs_last - cs_j)

    @classmethod
    def cut(cls, x_THP: Tensor, dt_TH: Tensor, a_H: Tensor, b_TGN: Tensor, c_TGN: Tensor, grid: _Grid) -> _Chunks:
        groups = b_TGN.shape[1]
        x, dt = _to_chunks(x_THP, grid), _to_chunks(dt_TH, grid)
        n, size, heads = dt.shape
        b, c = (_to_chunks(v, grid).transpose(1, 2).reshape(n * groups, size, -1) for v in (b_TGN, c_TGN))
        cs = (
            (dt * a_H)
            .cumsum(1)
            .view(n, size, groups, heads // groups)
            .permute(0, 2, 3, 1)
            .reshape(n * groups, -1, size)
        )
        u = _by_head(x * dt[..., None], groups)
        return cls(u, b, c, dt, x, cs, cs.exp(), (cs[..., -1:] - cs).exp())

    def decay(self) -> Tensor:
        """[nG, h, C, C]: exp(cs_i - cs_j) for i >= j, else 0."""
        difference = self.cs[..., :, None] - self.cs[..., None, :]
        size = difference.shape[-1]
        later = torch.ones(size, size, dtype=torch.bool, device=difference.device).triu(1)
        return difference.masked_fill_(later, -torch.inf).exp_()

    def by_token(self, v: Tensor) -> Tensor:
        """[nG, h, C, P] -> [nG, C, hP], for one matrix product over all heads of a group."""
        return v.transpose(1, 2).flatten(2)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_THP: Tensor,
        dt_TH: Tensor,
        a_H: Tensor,
        b_TGN: Tensor,
        c_TGN: Tensor,
        d_H: Tensor,
        initial: Tensor,
        grid: _Grid,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, heads, groups = grid.token_nC.shape[0], x_THP.shape[1], b_TGN.shape[1]
        chunks = _Chunks.cut(x_THP, dt_TH, a_H, b_TGN, c_TGN, grid)
        weighted = chunks.u * chunks.to_end[..., None]
        gains = torch.bmm(chunks.by_token(weighted).transpose(1, 2), chunks.b)  # [nG, hP, N]
        gains = gains.view(n, heads, x_THP.shape[2], -1)
        fade = chunks.from_start[..., -1].reshape(n, heads, 1, 1)
        before = torch.empty_like(gains)
        after = torch.empty_like(gains)
        for k, (s, opens) in enumerate(zip(grid.sequence, grid.opens, strict=True)):
            before[k] = initial[s] if opens else after[k - 1]
            torch.addcmul(gains[k], fade[k], before[k], out=after[k])
        scores = torch.bmm(chunks.c, chunks.b.transpose(1, 2))[:, None] * chunks.decay()
        y = torch.matmul(scores, chunks.u)
        carried = torch.bmm(chunks.c, before.view(n * groups, -1, before.shape[-1]).transpose(1, 2))  # [nG, C, hP]
        carried = carried.view(n * groups, y.shape[2], y.shape[1], -1).transpose(1, 2)
        y.addcmul_(chunks.from_start[..., None], carried)
        y_THP = _to_row(_from_head(y, n), grid) + d_H[:, None] * x_THP
        final = (
            torch.stack([after[k] if k >= 0 else initial[s] for s, k in enumerate(grid.last)]) if grid.last else initial
        )
        ctx.save_for_backward(x_THP, dt_TH, a_H, b_TGN, c_TGN, d_H, before)
        ctx.grid = grid
        return y_THP, final, after[list(grid.kept)]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        dy_THP, dfinal, dkept = gradients
        x_THP, dt_TH, a_H, b_TGN, c_TGN, d_H, before = ctx.saved_tensors
        grid: _Grid = ctx.grid
        n, groups = grid.token_nC.shape[0], b_TGN.shape[1]
        chunks = _Chunks.cut(x_THP, dt_TH, a_H, b_TGN, c_TGN, grid)
        dy = _by_head(_to_chunks(dy_THP, grid), groups)
        du, db, dc, dcs = _backward_inside(chunks, dy)

        before_g = before.view(n * groups, -1, before.shape[-1])  # [nG, hP, N]
        faded = chunks.by_token(dy * chunks.from_start[..., None])  # [nG, C, hP]
        dbefore = torch.bmm(faded.transpose(1, 2), chunks.c).view_as(before)
        dc += torch.bmm(faded, before_g)
        carried = torch.bmm(chunks.c, before_g.transpose(1, 2)).view(*faded.shape[:2], dy.shape[1], -1).transpose(1, 2)
        dcs += (dy * carried).sum(-1) * chunks.from_start

        dafter, dinitial = _backward_carry(chunks, before, dbefore, dfinal, dkept, dcs, grid)
        dafter_g = dafter.view(n * groups, -1, before.shape[-1])
        weighted = chunks.by_token(chunks.u * chunks.to_end[..., None])
        db += torch.bmm(weighted, dafter_g)
        dgain = torch.bmm(chunks.b, dafter_g.transpose(1, 2)).view(*faded.shape[:2], dy.shape[1], -1).transpose(1, 2)
        dgain = dgain * chunks.to_end[..., None]
        du += dgain
        pull = (dgain * chunks.u).sum(-1)
        dcs -= pull
        dcs[..., -1] += pull.sum(-1)

        dda = dcs.flip(-1).cumsum(-1).flip(-1).view(n, -1, dcs.shape[-1]).transpose(1, 2)  # [n, C, H]
        du = _from_head(du, n)
        ddt = _to_row(dda * a_H + (du * chunks.x).sum(-1), grid)
        dx = _to_row(du * chunks.dt[..., None], grid) + d_H[:, None] * dy_THP
        db, dc = (_to_row(v.view(n, groups, *v.shape[1:]).transpose(1, 2), grid) for v in (db, dc))
        return dx, ddt, (dda * chunks.dt).sum((0, 1)), db, dc, (dy_THP * x_THP).sum((0, 2)), dinitial, None


def _backward_inside(chunks: _Chunks, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients through the products inside a chunk: of u, B, C and cs."""
    decay = chunks.decay()
    scores = torch.bmm(chunks.c, chunks.b.transpose(1, 2))[:, None] * decay
    du = torch.matmul(scores.transpose(2, 3), dy)
    dscores = torch.matmul(dy, chunks.u.transpose(2, 3))
    dproduct = (dscores * decay).sum(1)  # [nG, C, C]
    pull = dscores.mul_(scores)
    dcs = pull.sum(3) - pull.sum(2)
    return du, torch.bmm(dproduct.transpose(1, 2), chunks.c), torch.bmm(dproduct, chunks.b), dcs


def _backward_carry(
    chunks: _Chunks, before: Tensor, dbefore: Tensor, dfinal: Tensor, dkept: Tensor, dcs: Tensor, grid: _Grid
) -> tuple[Tensor, Tensor]:
    """The recurrence between chunks, backwards: gradients of the state after each chunk and of the initial states;
    adds to dcs.
    """
    n, heads = before.shape[:2]
    fade = chunks.from_start[..., -1].reshape(n, heads, 1, 1)
    dafter = torch.zeros_like(before)
    dinitial = torch.zeros_like(dfinal)
    for s, k in enumerate(grid.last):
        (dafter[k] if k >= 0 else dinitial[s]).add_(dfinal[s])
    for place, k in enumerate(grid.kept):
        dafter[k] += dkept[place]
    for k in reversed(range(n)):
        dbefore[k].addcmul_(fade[k], dafter[k])
        target = dinitial[grid.sequence[k]] if grid.opens[k] else dafter[k - 1]
        target.add_(dbefore[k])
    dcs[..., -1] += ((dafter * before).sum((2, 3)) * fade[..., 0, 0]).view(dcs.shape[:2])
    return dafter, dinitial


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
    chunk: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan: y_THP, the state after each sequence [S, H, P, N], and the states after the tokens `keep` [len(keep),
    H, P, N].

    Computes in float32 (float64 if x is), whatever comes in; y has the dtype of x, states have the dtype of the
    computation.
    """
    dtype = torch.promote_types(x_THP.dtype, torch.float32)
    heads, width, size = *x_THP.shape[1:], b_TGN.shape[2]
    if initial_SHPN is None:
        initial_SHPN = x_THP.new_zeros(segments.count, heads, width, size, dtype=dtype)
    x, dt, a, b, c, d = (v.to(dtype) for v in (x_THP, dt_TH, a_H, b_TGN, c_TGN, d_H))
    if not segments.tokens:
        return torch.zeros_like(x_THP), initial_SHPN, initial_SHPN[:0]
    chunk = min(chunk, max(16, 1 << (max(segments.lengths) - 1).bit_length()))
    grid = _grid(segments.lengths, tuple(keep), chunk, x_THP.device)
    y_THP, final, kept = _Scan.apply(x, dt, a, b, c, d, initial_SHPN.to(dtype), grid)
    return y_THP.to(x_THP.dtype), final, kept


def ssd_step(
    x_SHP: Tensor,
    dt_SH: Tensor,
    a_H: Tensor,
    b_SGN: Tensor,
    c_SGN: Tensor,
    d_H: Tensor,
    state: Tensor,
    slots_S: Tensor,
    seed: Tensor | None = None,
) -> Tensor:
    """One token of each sequence: y_SHP; `state[slots]` is advanced in place. No gradient.

    A float16 state is rounded at random in proportion: it needs a `seed` [S] int64, other ones for every call.
    """
    sequences, heads, width = x_SHP.shape
    groups, size = b_SGN.shape[1:]
    half = state.dtype == torch.float16
    assert seed is not None or not half, "a float16 state is rounded at random: give a seed"
    dtype = torch.float32 if half else state.dtype
    x, dt = x_SHP.to(dtype), dt_SH.to(dtype)
    old = state[slots_S].to(dtype).view(sequences, groups, -1, size)  # [S, G, hP, N]
    decay = torch.exp(dt * a_H)[:, :, None].expand(-1, -1, width).reshape(sequences, groups, -1, 1)
    u = (dt[:, :, None] * x).view(sequences, groups, -1, 1)
    new = torch.addcmul(old * decay, u, b_SGN.to(dtype)[:, :, None, :])
    if half and seed is not None:
        new = _at_random(new.reshape(sequences, -1), seed).view(new.shape)
    state[slots_S] = new.view(sequences, heads, width, size).to(state.dtype)
    y = torch.matmul(new, c_SGN.to(dtype)[..., None]).view(sequences, heads, width)
    return torch.addcmul(y, x, d_H.to(dtype)[:, None]).to(x_SHP.dtype)


def _at_random(x_SN: Tensor, seed_S: Tensor) -> Tensor:
    """float32 [S, N] -> numbers of float16, up or down at random in proportion: 13 random bits (of a hash of seed and
    place) are added below the last that float16 keeps. Below its normal range (6e-5) rounding is to the nearest.
    """
    word = seed_S[:, None] * 0x1E3779B97F4A7C15 + torch.arange(x_SN.shape[1], device=x_SN.device) * 0x5851F42D4C957F2D
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        word = (word ^ (word >> 31)) * factor
    bits = x_SN.contiguous().view(torch.int32) + ((word >> 40) & 0x1FFF).to(torch.int32)
    return (bits & -0x2000).view(torch.float32).clamp(-65504.0, 65504.0)
