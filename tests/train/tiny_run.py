"""A model and a source so small that a step takes milliseconds, shared by the tests and by the processes they kill."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from whimbrel.events import Report, silent
from whimbrel.model.config import ModelConfig
from whimbrel.model.language import LanguageModel
from whimbrel.train.loop import TrainSettings, pretrain
from whimbrel.train.optimizer import OptimizerSettings
from whimbrel.train.schedule import ScheduleSettings

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
    """A hybrid of four layers. Every parameter is random, also those that training starts from 0 or 1."""
    model = LanguageModel(CONFIG).initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_settings(**changes: Any) -> TrainSettings:
    """A run of 12 steps of two micro-batches on one thread."""
    settings = TrainSettings(
        steps=12,
        accumulate=2,
        threads=1,
        validate_every=5,
        validate_batches=2,
        checkpoint_every=5,
        tensorboard=False,
        optimizer=OptimizerSettings(learning_rate=0.01),
        schedule=ScheduleSettings(warmup_steps=2),
    )
    return replace(settings, **changes)


def tiny_train(folder: Path, report: Report = silent, **changes: Any) -> LanguageModel:
    """Run the tiny training in a folder; returns the model it ends with."""
    model = tiny_model()
    pretrain(tiny_settings(**changes), TinySource(0), TinySource(1), model, folder, report)
    return model


def curve(folder: Path) -> list[dict[str, float]]:
    """The lines of the metrics file without what depends on the clock."""
    clock = ("seconds", "tokens_per_second", "mfu")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]
