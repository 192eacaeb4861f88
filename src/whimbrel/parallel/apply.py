"""Everything that is done to a model for several processes, from outside and in one order: tensor parallel, context
parallel, activation checkpointing, compilation, FSDP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard

from whimbrel.model.language import LanguageModel
from whimbrel.parallel import tensor
from whimbrel.parallel.mesh import Axes, Share
from whimbrel.parallel.recompute import recomputed


@contextmanager
def applied(model: LanguageModel, axes: Axes, *, recompute: bool = False, compiled: bool = False) -> Iterator[Share]:
    """Spread a model over the processes that were started, in place; yields this one's share of the work.

    Every process has built the same whole model. Context parallel changes nothing in the model: `share` cuts the
    batches, and layouts carry the exchange. Behind the block the layers are no longer recomputed; the model stays
    spread (`model.share`), and `model.save` writes it from all ranks. Raises UserError for axes that do not fit.
    """
    axes.check_model(model.config)
    share = Share.meet(axes, model.device)
    if axes.processes > 1:
        model.share = share
    if axes.tensor > 1:
        tensor.cut(model, share)
    with recomputed(model, recompute):
        if compiled:
            for layer in model.layers:
                layer.forward = torch.compile(layer.forward)
        if axes.fsdp > 1:
            _shard(model, share)
        yield share


def _shard(model: LanguageModel, share: Share) -> None:
    """FSDP2 over the axis `fsdp`: a unit for each layer, for an embedding and a head of their own, and for the rest.

    Gradients are summed, not averaged: counts were summed over ranks before, and each rank's loss is its share.
    """
    assert share.mesh is not None
    alone = [] if model.config.tie_embeddings else [model.embeddings, model.head]
    for module in (*alone, *model.layers, model):
        fully_shard(module, mesh=share.mesh["fsdp"])
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
