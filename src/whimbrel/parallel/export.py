"""A Hugging Face folder written by all ranks at once: each writes what lies on it, at its place in the files.

Nothing is gathered. The first rank makes the files at their full size with their headers; then every rank maps them and
fills in its rectangles. The folder must be one that all ranks see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whimbrel.model import checkpoint, families, tensors
from whimbrel.model.language import LanguageModel
from whimbrel.model.tensors import Place
from whimbrel.parallel.mesh import Share
from whimbrel.parallel.pieces import parts
from whimbrel.parallel.tensor import cuts


def save(
    model: LanguageModel, share: Share, folder: Path, tokenizer_folder: str | Path | None = None, **words: Any
) -> None:
    """`checkpoint.save` of a model that is spread over ranks, with its other `words`; all of them call it."""
    if share.first:
        whole = LanguageModel(model.config, device="meta", dtype=model.dtype)
        write = partial(_write_first, model, share)
        checkpoint.save(whole, folder, tokenizer_folder, write=write, **words)
    else:
        _fill(model, share, share.tell({}))
    share.barrier()


def _write_first(
    model: LanguageModel, share: Share, held: Mapping[str, Tensor], folder: Path, shard_bytes: int
) -> None:
    """In the place of `tensors.write`: the tensors are on the meta device, their numbers are everywhere."""
    _fill(model, share, share.tell(tensors.reserve(held, folder, shard_bytes)))


@torch.no_grad()
def _fill(model: LanguageModel, share: Share, places: dict[str, Place]) -> None:
    """Write this rank's parts. Of equal copies the first one writes."""
    table, config = cuts(model.config), model.config
    names = families.names(config)
    targets = {theirs: ours for ours, theirs in names.items()} | dict(families.copies(config))
    held = model.state_dict()
    writes = not (share.place["data"] or share.place["context"])
    for theirs, place in places.items():
        ours = targets[theirs]
        if not writes or (ours not in table and share.place["tensor"]):
            continue
        for part in parts(held[ours], table.get(ours), share):
            if part.tensor.numel():
                _paste(place, part.offset, part.tensor)
    share.barrier()


def _paste(place: Place, offset: tuple[int, ...], tensor: Tensor) -> None:
    """Numbers of a rectangle into the file. A depthwise convolution lies there as [I, 1, W], which is [I, W] too."""
    shape = tuple(size for at, size in enumerate(place.shape) if not (len(place.shape) == 3 and at == 1))
    size = place.dtype.itemsize
    flat = np.memmap(place.file, np.uint8, "r+", place.offset, (math.prod(shape) * size,))
    whole = flat.reshape(*shape[:-1], shape[-1] * size)
    here = tensor.detach().to("cpu", place.dtype).contiguous()
    raw = here.view(torch.uint8).numpy().reshape(*tensor.shape[:-1], tensor.shape[-1] * size)
    corner = [slice(a, a + n) for a, n in zip(offset[:-1], tensor.shape[:-1], strict=True)]
    last = slice(offset[-1] * size, (offset[-1] + tensor.shape[-1]) * size)
    whole[(*corner, last)] = raw
    flat.flush()
