"""Everything that is done to a model for several processes, from outside and in one order: tensor parallel, context
parallel, activation checkpointing, compilation, FSDP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from whimbrel.model.language import LanguageModel
from whimbrel.parallel import tensor
from whimbrel.parallel.mesh import Axes, Share
from whimbrel.parallel.recompute import recomputed

Compile = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


@contextmanager
def applied(
    model: LanguageModel, axes: Axes, *, recompute: bool = False, compile: Compile | None = None
) -> Iterator[Share]:
    """Spread a model over the processes that were started, in place; yields this one's share of the work.

    Every process has built the same whole model. Context parallel changes nothing in the model: `share` cuts the
    batches, and layouts carry the exchange. `compile` makes a layer's forward faster, as `torch.compile` does. Behind
    the block the layers are as they were, neither recomputed nor compiled; the model stays spread (`model.share`), and
    `model.save` writes it from all ranks. Raises UserError for axes that do not fit.
    """
    axes.check_model(model.config)
    share = Share.meet(axes, model.device)
    if axes.processes > 1:
        model.share = share
    if axes.tensor > 1:
        tensor.cut(model, share)
    with recomputed(model, recompute), _compiled(model, compile):
        if axes.fsdp > 1:
            _shard(model, share)
        yield share


@contextmanager
def _compiled(model: LanguageModel, compile: Compile | None) -> Iterator[None]:
    before = [dict(layer.__dict__) for layer in model.layers]
    if compile is not None:
        for layer in model.layers:
            layer.forward = compile(layer.forward)
    try:
        yield
    finally:
        for layer, had in zip(model.layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if "forward" in had:
                layer.forward = had["forward"]


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
