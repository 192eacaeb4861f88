"""What is minimised: named terms, each a sum over labelled things and their number, kept apart until the end.

A mean per micro-batch, averaged afterwards, weighs tokens of short micro-batches more. So an objective never divides:
the step adds the counts of all micro-batches and ranks first, and divides every sum by that one number (step.py).

T packed tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from whimbrel import ops
from whimbrel.errors import UserError
from whimbrel.model.language import LanguageModel
from whimbrel.model.layout import Layout
from whimbrel.parallel.context import Piece

IGNORE = -100
"""A target that is no target."""


@dataclass(frozen=True)
class Term:
    """One part of a loss: the loss is the sum over terms of weight * (all sums) / (all counts)."""

    sum: Tensor
    """Scalar with a gradient, float32."""
    count: int
    """What the sum is over: labelled tokens, pairs, ..."""
    weight: float = 1.0


class Batch(Protocol):
    """A row of packed documents. The targets are already shifted, and never cross into the next document."""

    @property
    def tokens_T(self) -> np.ndarray:
        """int64 ids."""

    @property
    def targets_T(self) -> np.ndarray:
        """int64 id that follows each token; -100 where nothing is to be learned."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document piece; they add up to T."""


class Objective(Protocol):
    """A pure function of a model and a batch.

    It names the same terms for every batch, with count 0 where there is nothing.
    """

    def counts(self, batch: Any) -> dict[str, int]:
        """The count of each term, from the batch alone: known before any forward."""

    def __call__(self, model: LanguageModel, batch: Any) -> dict[str, Term]:
        """The terms, with the same counts."""


def layout_of(batch: Batch, device: torch.device, rows: Tensor | None = None) -> Layout:
    """How a batch is cut; a piece of one knows how to reach the rest."""
    if isinstance(batch, Piece):
        return batch.layout(device, rows)
    return Layout.of(batch.lengths, rows=rows, device=device)


@dataclass(frozen=True)
class CrossEntropy:
    """Next-token prediction. Logits exist for `chunk` tokens at a time and are never held whole."""

    chunk: int = 1024

    def counts(self, batch: Batch) -> dict[str, int]:
        """Labelled tokens."""
        return {"loss": int((batch.targets_T != IGNORE).sum())}

    def __call__(self, model: LanguageModel, batch: Batch) -> dict[str, Term]:
        """The term `loss`: summed cross-entropy in nats."""
        device = next(model.parameters()).device
        if len(batch.tokens_T) and batch.tokens_T.max() >= model.config.vocab_size:
            raise UserError(
                f"the data hold token {batch.tokens_T.max()}, the model knows {model.config.vocab_size} entries; "
                "make the tokens with the tokenizer of this model"
            )
        tokens_T = torch.from_numpy(batch.tokens_T).to(device)
        targets_T = torch.from_numpy(batch.targets_T).to(device)
        hidden_TD = model(tokens_T, layout_of(batch, device))
        loss_T = model.head(hidden_TD, lambda hidden, weight: ops.cross_entropy(hidden, weight, targets_T, self.chunk))
        return {"loss": Term(loss_T.sum(), self.counts(batch)["loss"])}
