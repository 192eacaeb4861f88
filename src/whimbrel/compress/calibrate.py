"""Real text through a model: how well it is predicted, and what reaches each matrix, layer after layer.

T tokens of a window, D model width, I inputs of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whimbrel.model.language import LanguageModel
from whimbrel.model.layout import Layout
from whimbrel.model.linear import PackedLinear

ROWS = 256
"""Tokens whose logits are held at a time."""


@torch.inference_mode()
def perplexity(model: LanguageModel, windows: Sequence[Tensor]) -> float:
    """exp of the mean negative log-likelihood of every token of the windows [T] but each one's first."""
    total = 0.0
    for tokens_T in windows:
        hidden_TD = model(tokens_T, Layout.of([len(tokens_T)]))
        for some_TD, next_T in zip(hidden_TD[:-1].split(ROWS), tokens_T[1:].split(ROWS), strict=True):
            total += F.cross_entropy(model.head(some_TD), next_T, reduction="sum").item()
    return math.exp(total / sum(len(tokens_T) - 1 for tokens_T in windows))


@torch.no_grad()
def visit(model: LanguageModel, windows: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each matrix in the order of computation: its name and the sum of x x^T over its inputs x, [I, I] float64.

    The embedding's look-up is left out; a tied one comes last, for its use as the head. A layer's matrices come one
    after the other; replace them as they come, and the next layer is computed with the new ones. Held are the streams
    of all windows (T D numbers each) and the sums of one layer.
    """
    streams, products = [model.embeddings(tokens_T) for tokens_T in windows], _Products()
    layouts = [Layout.of([len(tokens_T)]) for tokens_T in windows]
    for index, layer in enumerate(model.layers):
        projections = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear | PackedLinear)}
        grams = {name: torch.zeros(1, dtype=torch.float64) for name in projections}
        hooks = [m.register_forward_pre_hook(products.adding(grams, name)) for name, m in projections.items()]
        for x_TD, layout in zip(streams, layouts, strict=True):
            layer(x_TD, layout, None)
        for hook in hooks:
            hook.remove()
        for name in projections:
            yield f"layers.{index}.{name}", grams.pop(name)
        streams = [layer(x_TD, layout, None) for x_TD, layout in zip(streams, layouts, strict=True)]
    grams = {"": torch.zeros(1, dtype=torch.float64)}
    for x_TD in streams:
        products.adding(grams, "")(None, (model.norm_f(x_TD),))
    yield "embeddings" if model.config.tie_embeddings else "head", grams[""]


class _Products:
    """x^T x of the input seen last: q, k and v (or up and gate) share theirs."""

    def __init__(self) -> None:
        self.x_TI: Tensor | None = None
        self.gram_II = torch.empty(0)

    def adding(self, grams: dict[str, Tensor], name: str) -> Callable[..., None]:
        """A hook that adds its module's inputs to `grams[name]`."""

        def hook(_: nn.Module | None, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0] is not self.x_TI:
                self.x_TI = inputs[0]
                self.gram_II = self.x_TI.T @ self.x_TI
            grams[name] = grams[name] + self.gram_II

        return hook
