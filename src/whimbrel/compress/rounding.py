"""Rounding a matrix so that the errors of its weights cancel, over the inputs that it is used with.

First the inputs of a projection are rounded one after the other; what each rounding adds to the outputs is taken back,
as far as the inputs are correlated, by those that are still to come (GPTQ, arXiv 2210.17323). Then every scale and
every code is moved to where it is best beside all others, a few times over: coordinate descent on the same squared
error (as QuantEase, arXiv 2309.01885). Rounding to the nearest is `ops.packed.round_to_nearest`.
O outputs, I inputs, G groups of inputs that share a scale, J inputs of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST, HIGHEST = {8: -127, 4: -8}, {8: 127, 4: 7}
CLIPS = {8: (1.0,), 4: (1.0, 0.88, 0.76)}
"""Shares of a group's largest weight that are tried as the end of the scale; 8 bits win nothing by clipping."""
DAMPING = 0.03
"""Share of the mean of the Gram matrix's diagonal that is added: inputs that were hardly seen are trusted less."""


SWEEPS = 4
"""Rounds of coordinate descent; later ones move little."""


def calibrated(weight_OI: Tensor, gram_II: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes [O, I] and scales [O, G] for `ops.packed.pack`, given the sum of x x^T over the matrix's inputs x."""
    mean = gram_II.diagonal().mean()
    eye_II = torch.eye(len(gram_II), dtype=torch.float64)
    hessian_II = gram_II.double() / mean + DAMPING * eye_II if mean > 0 else eye_II
    code_OI, scale_OG = gptq(weight_OI, inverse_factor(hessian_II), bits, group)
    return descend(weight_OI, hessian_II, code_OI, scale_OG, bits)


def inverse_factor(hessian_II: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a positive matrix, computed in float64: [I, I] float32."""
    h_II = torch.linalg.cholesky(hessian_II.double())
    h_II = torch.cholesky_inverse(h_II)
    return torch.linalg.cholesky(h_II, upper=True).float()


def descend(
    weight_OI: Tensor, hessian_II: Tensor, code_OI: Tensor, scale_OG: Tensor, bits: int, sweeps: int = SWEEPS
) -> tuple[Tensor, Tensor]:
    """Better codes and scales: each moved in turn to the least of (w - scale code) H (w - scale code)^T."""
    group, h_II = weight_OI.shape[1] // scale_OG.shape[1], hessian_II.float()
    code_IO, scale_GO = code_OI.T.float().contiguous(), scale_OG.T.clone()
    rest_IO = weight_OI.float().T - code_IO * scale_GO.repeat_interleave(group, 0)
    for _ in range(sweeps):
        for g, scale_O in enumerate(scale_GO):
            block = slice(g * group, (g + 1) * group)
            own_JJ, code_JO = h_II[block, block], code_IO[block]
            pull_JO = h_II[block] @ rest_IO  # half the gradient, of which steps in this block are taken off
            size_O = (code_JO * (own_JJ @ code_JO)).sum(0)
            moved_O = _half(scale_O + torch.where(size_O > 0, (code_JO * pull_JO).sum(0) / size_O, 0))
            change_JO = (moved_O - scale_O) * code_JO
            pull_JO -= own_JJ @ change_JO
            rest_IO[block] -= change_JO
            scale_O.copy_(moved_O)
            for j in range(group):
                old_O = code_JO[j].clone()
                code_JO[j] = _codes(old_O * scale_O + pull_JO[j] / own_JJ[j, j], scale_O, bits)
                step_O = (code_JO[j] - old_O) * scale_O
                pull_JO -= own_JJ[:, j, None] * step_O
                rest_IO[block.start + j] -= step_O
    return code_IO.T.to(torch.int8), scale_GO.T


def gptq(weight_OI: Tensor, factor_II: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes [O, I] and scales [O, G] of a matrix, for `ops.packed.pack`, given `inverse_factor` of the Hessian."""
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
