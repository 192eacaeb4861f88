"""Activation checkpointing, applied from outside: keep each layer's input, compute the layer again in the backward.

Chen et al., arXiv 1604.06174. Memory of activations falls from all layers to their inputs and one layer; time grows by
about a forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch.utils.checkpoint import checkpoint

from whimbrel.model.language import LanguageModel


@contextmanager
def recomputed(model: LanguageModel, on: bool = True) -> Iterator[None]:
    """Inside, every layer is recomputed in the backward.

    Names of parameters and results stay the same; `on=False` does nothing.
    """
    if not on:
        yield
        return
    for layer in model.layers:
        # The layers draw no random numbers, so there is no state of a generator to keep.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in model.layers:
            del layer.forward  # the class's own method shows again
