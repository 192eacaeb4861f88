"""The stage `pretrain`: token shards and a tokenizer in, a model out.

OUT/model/            Hugging Face folder of the trained model, with the tokenizer's files
OUT/metrics.jsonl     one line a step, and one for each look at held-out data
OUT/checkpoints/      training state; what an interrupted stage goes on from
OUT/tensorboard/      the same figures, if the package is installed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from whimbrel.data.blend import Blend, Phase
from whimbrel.data.pack import Source, Windows
from whimbrel.data.shards import TokenShards
from whimbrel.errors import UserError, nearest
from whimbrel.events import Report
from whimbrel.model.config import ModelConfig, RopeScaling
from whimbrel.model.language import LanguageModel
from whimbrel.model.presets import preset
from whimbrel.text import Tokenizer
from whimbrel.train.loop import TrainSettings, pretrain


@dataclass(frozen=True)
class BlendSettings:
    """Which shards, in which proportion, when (data/blend.py)."""

    sources: dict[str, str] = field(default_factory=lambda: {"train": "train"})
    """Shard by name of source: a path without .bin or .idx, seen from the input `tokens`."""
    phases: tuple[Phase, ...] = ()
    """Weights of the sources, each until a share of the run; none: by the number of tokens."""
    epochs: dict[str, float] = field(default_factory=dict)
    """How often a source may be seen at most, by name; others repeat as often as needed."""


@dataclass(frozen=True)
class PretrainSettings:
    """A model from random weights."""

    model: dict[str, Any]
    """`preset: NAME`, or fields of a model, or a preset and fields that differ; the vocabulary comes from the
    tokenizer.
    """
    length: int = 512
    """Tokens of a row; documents in it do not see each other."""
    batch_rows: int = 8
    """Rows of a micro-batch."""
    seed: int = 0
    """Of the first weights and of the order of data."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU if there is one."""
    heldout: str = "heldout"
    """Shard that is only looked at, seen from the input `tokens`; may be absent."""
    blend: BlendSettings = field(default_factory=BlendSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        for name in ("length", "batch_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; set {name} to 1 or more")
        check_device(self.device)
        config = model_config({"vocab_size": 2**17} | self.model)  # what is wrong with it is said before anything runs
        if self.length > config.max_position_embeddings:
            raise UserError(
                f"length {self.length} is beyond model.max_position_embeddings {config.max_position_embeddings}; "
                "set the second to at least the first"
            )


def check_device(device: str) -> None:
    """Raise `UserError` unless it is a word for a device."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {device!r}; set device to auto, cpu or cuda")


def torch_device(device: str) -> torch.device:
    """The device to train on."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch finds no GPU; set device to cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def run(settings: PretrainSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Train on the inputs `tokens` and `tokenizer`; goes on from what it finds in `out`.

    Returns the figures of the run.
    """
    tokenizer = Tokenizer.load(inputs["tokenizer"])
    model = LanguageModel(fitted(settings.model, tokenizer), device=torch_device(settings.device)).initialise(
        settings.seed
    )
    source = blend(settings, inputs["tokens"])
    report({"event": "log", "text": source.preview()})
    validation, train = None, settings.train
    if (inputs["tokens"] / f"{settings.heldout}.idx").exists():
        rows = Windows(TokenShards(inputs["tokens"] / settings.heldout), settings.length, seed=0)
        validation = Source(rows, settings.batch_rows)
        train = replace(train, validate_batches=min(train.validate_batches, -(-rows.count // settings.batch_rows)))
    else:
        report(
            {
                "event": "warning",
                "text": f"{inputs['tokens']} has no shard {settings.heldout!r}; no loss on held-out data",
            }
        )
    figures = pretrain(train, source, validation, model, out, report)
    model.save(out / "model", inputs["tokenizer"])
    return figures


def model_config(said: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from the `model` section of settings. `UserError` on fields no model has."""
    given = {name: _value(name, value) for name, value in said.items() if name != "preset"}
    known = {f.name for f in fields(ModelConfig)}
    for name in given:
        if name not in known:
            raise UserError(f"unknown setting model.{name}; {nearest(name, known | {'preset'})}")
    if "preset" in said:
        return replace(preset(said["preset"]), **given)
    for name in ("pattern", "hidden_size"):
        if name not in given:
            raise UserError(f"model.{name} is missing; set it, or set model.preset, for example to hybrid-tiny")
    return ModelConfig(**given)


def fitted(said: Mapping[str, Any], tokenizer: Tokenizer) -> ModelConfig:
    """The model of the settings with the tokenizer's vocabulary and special tokens; a larger vocabulary is left as
    it is.
    """
    vocabulary = said.get("vocab_size", tokenizer.vocab_size)
    if vocabulary < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {vocabulary}, the tokenizer has {tokenizer.vocab_size} entries; leave it out"
        )
    eos = tokenizer.eos_ids
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": tokenizer.pad_id,
    }
    return model_config({**said, "vocab_size": vocabulary, **ids})


def blend(settings: PretrainSettings, tokens: Path) -> Blend:
    """The order of all training data, fixed before the first step."""
    sources = {
        name: Windows(TokenShards(tokens / prefix), settings.length, settings.seed)
        for name, prefix in settings.blend.sources.items()
    }
    even = Phase(1.0, {name: float(rows.shards.tokens) for name, rows in sources.items()})
    batches = settings.train.steps * settings.train.accumulate
    return Blend(sources, settings.blend.phases or (even,), settings.batch_rows, batches, settings.blend.epochs)


def _value(name: str, value: Any) -> Any:
    """YAML has lists and mappings where a ModelConfig has tuples and a RopeScaling."""
    if name == "rope_scaling" and isinstance(value, dict):
        return RopeScaling(**value)
    return tuple(value) if isinstance(value, list) else value
