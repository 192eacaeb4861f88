"""Weight matrices in 16, 8 or 4 bits, laid out as the native kernels or those of a GPU read them, and what they mean.

w[o, i] = scale[o, i // group] * code[o, i]. Eight rows and four inputs stand side by side, so that a vector of 32 bytes
holds the codes that meet four activations, and the sums of eight rows fall into its eight lanes.

16 bits  codes float16 [O, I], no scales
 8 bits  codes int8 [O/8, I/4, 32]; byte 4r + i of (p, k) is row 8p + r, input 4k + i
 4 bits  codes uint8 [O/8, I/8, 32]; low half of byte b: row 8p + b/4, input 8k + b%4; high half: 4 inputs on; code + 8
scales float16 [O/8, I/group, 8]. Where 8 does not divide O the last panel is filled up with rows of scale 0.

That is the form `panels`, the one on disk. On a GPU a matrix of 8 or 4 bits lies in `rows`:

 8 bits  codes int8 [O, I]
 4 bits  codes uint8 [O, I/2]; byte b of a group: low half its input b, high half its input b + group/2; code + 8
scales float16 [O, I/group], the rows of a group side by side in memory (stride 1 over O)

or in `fp8` (`ops/fp8.py`): codes E4M3 [O, I], scales float32 [O, 1], rows of zeros up to a multiple of 16.
O outputs, I inputs, n rows looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from whimbrel.ops.memory import settled

PANEL = 8
"""Rows of a panel."""
SLICE = 1 << 24
"""Weights that a GPU unpacks at a time for many rows: 32 MiB of bfloat16, which stay in the second-level cache."""
SIDE = 16
"""FP8 on a GPU: outputs and inputs must be multiples of it."""
GROUPS = (32, 64, 128)
"""Inputs that may share a scale."""


@dataclass(frozen=True, eq=False)
class Packed:
    """One weight matrix of few bits."""

    codes: Tensor
    scales: Tensor | None
    """None with 16 bits."""
    shape: tuple[int, int]
    """(O, I)."""
    bits: int
    """16, 8 or 4."""
    group: int = 0
    """Inputs that share a scale; 0 with 16 bits."""
    form: str = "panels"
    """`panels`, `rows` or `fp8`."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)


def code_shapes(shape: tuple[int, int], bits: int, group: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shapes of codes and scales of a matrix [O, I]. `group` must be 32, 64 or 128 and divide I."""
    outputs, inputs = shape
    if bits == 16:
        return shape, None
    assert bits in (8, 4) and group in GROUPS and inputs % group == 0, (shape, bits, group)
    panels = -(-outputs // PANEL)
    return (panels, inputs * bits // 32, 32), (panels, inputs // group, PANEL)


def pack(q_OI: Tensor, scale_OG: Tensor | None, bits: int) -> Packed:
    """Lay out whole numbers q (8 bits: -127 … 127, 4 bits: -8 … 7) and a scale a group; 16 bits: q are the weights."""
    outputs, inputs = q_OI.shape
    if bits == 16:
        return Packed(settled(q_OI.to(torch.float16).contiguous()), None, (outputs, inputs), 16)
    assert scale_OG is not None
    codes_shape, scales_shape = code_shapes((outputs, inputs), bits, inputs // scale_OG.shape[1])
    assert scales_shape is not None
    missing = -outputs % PANEL
    q_pri = F.pad(q_OI.to(torch.int16), (0, 0, 0, missing)).unflatten(0, (-1, PANEL))
    scales = F.pad(scale_OG.to(torch.float16), (0, 0, 0, missing)).unflatten(0, (-1, PANEL)).transpose(1, 2)
    if bits == 8:
        codes = q_pri.unflatten(2, (-1, 4)).transpose(1, 2).to(torch.int8)
    else:
        halves = (q_pri + 8).unflatten(2, (-1, 2, 4)).transpose(1, 2)  # [panel, I/8, row, half, 4]
        codes = (halves[..., 0, :] | halves[..., 1, :] << 4).to(torch.uint8)
    codes = settled(codes.reshape(codes_shape))
    return Packed(codes, scales.contiguous(), (outputs, inputs), bits, inputs // scales_shape[1])


def integers(weight: Packed) -> tuple[Tensor, Tensor]:
    """What `pack` was given for 8 or 4 bits: q_OI int8 and scale_OG float32."""
    assert weight.scales is not None and weight.form != "fp8"
    outputs = weight.shape[0]
    if weight.form == "rows":
        return _integers_of_rows(weight), weight.scales.float()
    q_OI = _integers(weight.codes, weight.bits).flatten(0, 1)
    return q_OI[:outputs], weight.scales.float().transpose(1, 2).flatten(0, 1)[:outputs]


def _integers(codes: Tensor, bits: int) -> Tensor:
    """[panel, row, I] int8."""
    if bits == 8:
        return codes.unflatten(2, (PANEL, 4)).transpose(1, 2).flatten(2)
    halves = torch.stack([codes & 15, codes >> 4], dim=2).unflatten(3, (PANEL, 4))  # [panel, I/8, half, row, 4]
    return (halves.to(torch.int8) - 8).permute(0, 3, 1, 2, 4).flatten(2)


def _integers_of_rows(weight: Packed) -> Tensor:
    if weight.bits == 8:
        return weight.codes
    bytes_ = weight.codes.unflatten(1, (-1, weight.group // 2))
    return torch.cat([bytes_ & 15, bytes_ >> 4], dim=2).flatten(1).to(torch.int8) - 8


def by_rows(weight: Packed) -> Packed:
    """The same matrix of 8 or 4 bits in the form `rows`, where it lies."""
    q_OI, scale_OG = integers(weight)
    codes = q_OI.contiguous()
    if weight.bits == 4:
        low, high = (q_OI + 8).to(torch.uint8).unflatten(1, (-1, 2, weight.group // 2)).unbind(2)
        codes = (low | high << 4).flatten(1)
    scales = scale_OG.to(torch.float16).t().contiguous().t()
    return Packed(codes, scales, weight.shape, weight.bits, weight.group, "rows")


def unpack(weight: Packed) -> Tensor:
    """The weights it stands for: float32 [O, I]."""
    if weight.bits == 16:
        return weight.codes.float()
    if weight.form == "fp8":
        assert weight.scales is not None
        return (weight.codes.float() * weight.scales)[: weight.shape[0]]
    q_OI, scale_OG = integers(weight)
    return (q_OI.float().unflatten(1, (-1, weight.group)) * scale_OG[..., None]).flatten(1)


def rows(weight: Packed, ids: Tensor) -> Tensor:
    """Some rows of the matrix in float32, as an embedding looks them up: [n, I]."""
    if weight.scales is None:
        return weight.codes[ids].float()
    if weight.form != "panels":
        some = (weight.codes[ids], weight.scales[ids], (len(ids), weight.shape[1]))
        return unpack(Packed(*some, weight.bits, weight.group, weight.form))
    panel, row, at = ids // PANEL, ids % PANEL, torch.arange(len(ids), device=ids.device)
    q_nI = _integers(weight.codes[panel], weight.bits)[at, row]
    scale_nG = weight.scales[panel, :, row].float()
    return (q_nI.float().unflatten(1, (-1, weight.group)) * scale_nG[..., None]).flatten(1)


def round_to_nearest(weight_OI: Tensor, bits: int, group: int = 32) -> Packed:
    """The nearest codes under the plainest scales: the largest weight of a group gets the code 127, or -8 of 4 bits."""
    if bits == 16:
        return pack(weight_OI, None, 16)
    grouped = weight_OI.float().unflatten(1, (-1, group))
    if bits == 8:
        scale_OG = grouped.abs().amax(-1) / 127
    else:
        scale_OG = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))[..., 0] / -8
    scale_OG = scale_OG.to(torch.float16).float()
    q = torch.where(scale_OG[..., None] == 0, 0, grouped / scale_OG[..., None]).round_()
    return pack(q.clamp_(*((-127, 127) if bits == 8 else (-8, 7))).flatten(1), scale_OG, bits)
