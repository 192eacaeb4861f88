"""Rounding a matrix so that the errors of its weights cancel, over the inputs that it is used with (arXiv 2210.17323).

The inputs of a projection are rounded one after the other; what each rounding adds to the outputs is taken back, as far
as the inputs are correlated, by those that are still to come. Rounding to the nearest is `ops.packed.round_to_nearest`.
O outputs, I inputs, G groups of inputs that share a scale, J inputs of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST, HIGHEST = {8: -127, 4: -8}, {8: 127, 4: 7}
CLIPS = {8: (1.0,), 4: (1.0, 0.88, 0.76)}
"""Shares of a group's largest weight that are tried as the end of the scale; 8 bits win nothing by clipping."""
DAMPING = 0.03
"""Share of the mean of the Hessian's diagonal that is added to it: inputs that were hardly seen are trusted less."""


def inverse_factor(hessian_II: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped Hessian (the sum of x x^T), in float64: [I, I] float32."""
    h_II = hessian_II.double()
    mean = h_II.diagonal().mean()
    h_II = h_II + torch.eye(len(h_II), dtype=h_II.dtype) * (DAMPING * mean if mean > 0 else 1.0)
    h_II = torch.linalg.cholesky(h_II)
    h_II = torch.cholesky_inverse(h_II)
    return torch.linalg.cholesky(h_II, upper=True).float()


def gptq(weight_OI: Tensor, factor_II: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes [O, I] and scales [O, G] of a matrix, for `ops.packed.pack`, given `inverse_factor` of its inputs."""
    outputs, inputs = weight_OI.shape
    rest_IO = weight_OI.float().T.contiguous()
    code_IO = torch.empty(inputs, outputs, dtype=torch.int8)
    scale_GO = torch.empty(inputs // group, outputs)
    for number, start in enumerate(range(0, inputs, group)):
        end = start + group
        own_JJ, block_JO = factor_II[start:end, start:end], rest_IO[start:end]
        scale_O = scales(block_JO, bits, own_JJ.diagonal() ** -2)
        error_JO = torch.empty_like(block_JO)
        for j in range(group):
            code_O = _codes(block_JO[j], scale_O, bits)
            error_JO[j] = (block_JO[j] - scale_O * code_O) / own_JJ[j, j]
            block_JO[j + 1 :] -= own_JJ[j, j + 1 :, None] * error_JO[j]
            code_IO[start + j] = code_O
        rest_IO[end:] -= factor_II[start:end, end:].T @ error_JO
        scale_GO[number] = scale_O
    return code_IO.T, scale_GO.T


def scales(weight_JO: Tensor, bits: int, importance_J: Tensor) -> Tensor:
    """The scale of each output's group with the least squared error, weighted by importance: [O], a float16 number.

    The largest weight of a group, or a bit less, gets the lowest or the highest code (with 4 bits these differ in
    size); each such scale is then moved to where it fits its own codes best.
    """
    extreme_O = weight_JO.gather(0, weight_JO.abs().argmax(0, keepdim=True))[0]
    best_O, least_O = torch.zeros_like(extreme_O), torch.full_like(extreme_O, torch.inf)
    weighted_JO = weight_JO * importance_J[:, None]
    for end in (LOWEST[bits], HIGHEST[bits]) if bits == 4 else (HIGHEST[bits],):
        for clip in CLIPS[bits]:
            code_JO = _codes(weight_JO, _half(extreme_O * clip / end), bits)
            fit_O, size_O = (weighted_JO * code_JO).sum(0), importance_J @ code_JO.square()
            scale_O = _half(torch.where(size_O > 0, fit_O / size_O, 0))
            # The error is |w|^2 - 2 scale fit + scale^2 size; the first term is the same for all.
            error_O = scale_O * (scale_O * size_O - 2 * fit_O)
            better_O = error_O < least_O
            best_O, least_O = torch.where(better_O, scale_O, best_O), torch.where(better_O, error_O, least_O)
    return best_O


def _half(scale: Tensor) -> Tensor:
    return scale.to(torch.float16).float()


def _codes(weight: Tensor, scale_O: Tensor, bits: int) -> Tensor:
    """The nearest whole numbers; 0 under a scale of 0."""
    return (weight / torch.where(scale_O == 0, torch.inf, scale_O)).round_().clamp_(LOWEST[bits], HIGHEST[bits])
