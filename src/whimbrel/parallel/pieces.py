"""Which part of which tensor lies on this rank: for sums over gradients, for checkpoints, for export, for drawing.

A parameter may be cut by `tensor` into segments (tensor.py) and what is left of it by `fsdp` into rows. What a rank
holds of one segment is always a rectangle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from whimbrel.model.language import LanguageModel
from whimbrel.parallel.mesh import Share
from whimbrel.parallel.tensor import Cut, cuts


def local(tensor: Tensor) -> Tensor:
    """The numbers that lie here, as a plain tensor that shares their memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All the numbers, on every rank of `fsdp`, which must all ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered(model: LanguageModel, share: Share) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model that is spread, whole on every rank, one after another; all must ask for all of them."""
    table = cuts(model.config) if share.axes.tensor > 1 else {}
    for name, tensor in model.state_dict().items():
        full = whole(tensor)
        if name in table:
            pieces = [torch.empty_like(full) for _ in range(share.axes.tensor)]
            distributed.all_gather(pieces, full.contiguous(), group=share.group("tensor"))
            full = table[name].whole(pieces)
        yield name, full


@dataclass(frozen=True, eq=False)
class Part:
    """A rectangle of one segment of a tensor."""

    segment: str
    whole: tuple[int, ...]
    """Shape of the segment."""
    inside: tuple[int, ...]
    """Where the rectangle begins in the segment."""
    offset: tuple[int, ...]
    """Where it begins in the whole tensor."""
    tensor: Tensor


def parts(tensor: Tensor, cut: Cut | None, share: Share) -> list[Part]:
    """What lies here of a parameter, or of a tensor of its shape; one part for each segment, which may be empty."""
    mine, first, rows = local(tensor), 0, tensor.shape[0] if tensor.dim() else 1
    if isinstance(tensor, DTensor):
        _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        first = int(offsets[0])
    rest = tuple(tensor.shape[1:])
    rank, ranks = share.place["tensor"], share.axes.tensor
    if cut is None or not tensor.dim():
        at = (first, *(0 for _ in rest)) if tensor.dim() else ()
        return [Part("", tuple(tensor.shape), at, at, mine)]
    if cut.dim == 1:
        at = (first, rank * rest[0])
        return [Part("", (rows, rest[0] * ranks), at, at, mine)]
    found, begin, base = [], 0, 0
    for label, size in cut.segments:
        share_of = size // ranks
        low = min(max(first, begin), begin + share_of)
        high = max(low, min(first + len(mine), begin + share_of))
        inside, zeros = rank * share_of + low - begin, tuple(0 for _ in rest)
        piece = mine[max(low - first, 0) : max(high - first, 0)]
        found.append(Part(label, (size, *rest), (inside, *zeros), (base + inside, *zeros), piece))
        begin, base = begin + share_of, base + size
    return found


class Scattered(Tensor):
    """A tensor whose parts lie on several ranks, in the words of torch.distributed.checkpoint: it has the shape of the
    whole, and no operation works on it.
    """

    part: Part

    @staticmethod
    def __new__(cls, part: Part) -> Scattered:
        """Around a part, whose memory it shares."""
        tensor = part.tensor.detach()
        made = Tensor._make_wrapper_subclass(cls, part.whole, dtype=tensor.dtype, device=tensor.device)
        made.part = replace(part, tensor=tensor)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own hint lacks the class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} of a scattered tensor")

    def copied(self) -> Scattered:
        """The same around a copy of the numbers in the CPU's memory."""
        return Scattered(replace(self.part, tensor=self.part.tensor.to("cpu", copy=True)))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        sizes = self.part.tensor.shape
        return [ChunkStorageMetadata(torch.Size(self.part.inside), sizes)] if sizes.numel() else []

    def __create_write_items__(self, name: str, value: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.part.tensor)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.part.tensor
