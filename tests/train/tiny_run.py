"""A model and a source so small that a step takes milliseconds, shared by the tests and by the processes they kill."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from whimbrel.model.config import ModelConfig
from whimbrel.model.language import LanguageModel

VOCABULARY = 31
CONFIG = ModelConfig(
    pattern="M*-M",
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
)


@dataclass(frozen=True)
class TinyBatch:
    """Packed documents of random lengths."""

    tokens_T: NDArray[np.int64]
    targets_T: NDArray[np.int64]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class TinySource:
    """Documents that count upwards in steps of 1 to 4, so that there is something to learn; pure in (seed, index)."""

    seed: int = 0
    documents: int = 3

    def batch(self, index: int) -> TinyBatch:
        """The batch of an index."""
        draw = np.random.default_rng([self.seed, index])
        return pack([self._document(draw) for _ in range(self.documents)])

    def _document(self, draw: np.random.Generator) -> NDArray[np.int64]:
        start, stride, length = draw.integers(VOCABULARY), draw.integers(1, 5), draw.integers(5, 20)
        return (start + stride * np.arange(length)) % VOCABULARY


def pack(documents: list[NDArray[np.int64]]) -> TinyBatch:
    """Lay documents end to end; the last token of each has no target."""
    targets = [np.append(document[1:], -100) for document in documents]
    lengths = tuple(len(document) for document in documents)
    return TinyBatch(np.concatenate(documents), np.concatenate(targets), lengths)


def tiny_model(seed: int = 0) -> LanguageModel:
    """A hybrid of four layers with random weights."""
    return LanguageModel(CONFIG).initialise(seed)
