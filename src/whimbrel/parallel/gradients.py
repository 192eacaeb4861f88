"""After the last backward of a step: sums over copies, and one norm over everything that is cut."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from whimbrel.model.language import LanguageModel
from whimbrel.parallel.mesh import Share
from whimbrel.parallel.pieces import local
from whimbrel.parallel.tensor import PARTIAL, cuts

BUCKET = 2**25
"""Numbers that are summed in one message."""


def present(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Name and local gradient of every parameter that has one."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, local(parameter.grad)


@torch.no_grad()
def finish(model: LanguageModel, share: Share) -> None:
    """Sum gradients over the axes that FSDP has not summed: `data` and `context`, and `tensor` where each rank saw
    its own heads.
    """
    axes = [axis for axis in ("data", "context") if getattr(share.axes, axis) > 1]
    if axes:
        for bucket in _buckets([gradient for _, gradient in present(model)]):
            flat = share.add(torch.cat([gradient.flatten() for gradient in bucket]), axes)
            sizes = [gradient.numel() for gradient in bucket]
            for gradient, total in zip(bucket, flat.split(sizes), strict=True):
                gradient.copy_(total.view_as(gradient))
    if share.axes.tensor > 1:
        for name, gradient in present(model):
            if name.endswith(PARTIAL):
                share.add(gradient, ("tensor",))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together about BUCKET numbers."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and (gradient.dtype != bucket[0].dtype or sum(g.numel() for g in bucket) > BUCKET):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@torch.no_grad()
def norm(model: LanguageModel, share: Share) -> Tensor:
    """Euclidean norm of the whole gradient: cut parts are summed over ranks, what is whole everywhere counts once."""
    table = cuts(model.config) if share.axes.tensor > 1 else {}
    squares = torch.zeros(2, dtype=torch.float32, device=share.device)  # whole, cut
    for name, gradient in present(model):
        squares[int(name in table)] += torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
    share.add(squares, ("fsdp",))
    share.add(squares[1:], ("tensor",))
    return squares.sum().sqrt()
