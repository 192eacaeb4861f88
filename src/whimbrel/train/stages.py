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
from whimbrel.data.pack import Source, WholeDocuments, Windows
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

    sources: dict[str, str] = field(default_factory=dict)
    """Shard by name of source: a path without .bin or .idx, seen from the input `tokens`, or from `tokens.NAME` where
    several inputs have names. None: the shard `train` of each input.
    """
    phases: tuple[Phase, ...] = ()
    """Weights of the sources, each until a share of the run; none: by the number of tokens."""
    epochs: dict[str, float] = field(default_factory=dict)
    """How often a source may be seen at most, by name; others repeat as often as needed."""


def check_device(device: str) -> None:
    """Raise `UserError` unless it is a word for a device."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {device!r}; set device to auto, cpu or cuda")


def torch_device(device: str) -> torch.device:
    """The device to train on."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch finds no GPU; set device to cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class RowSettings:
    """What a stage that trains on token shards reads, and how."""

    length: int = 512
    """Tokens of a row; documents in it do not see each other."""
    batch_rows: int = 8
    """Rows of a micro-batch."""
    whole: bool = False
    """Rows of whole documents, such as conversations; else the stream is cut every `length` tokens."""
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

    def rows(self, shard: Path, seed: int) -> Windows | WholeDocuments:
        """The rows of one shard."""
        return (WholeDocuments if self.whole else Windows)(TokenShards(shard), self.length, seed)

    def held_out(self, tokens: Mapping[str, Path], report: Report) -> tuple[Source | None, TrainSettings]:
        """Held-out rows of the first input, and the loop's settings with no more looks at them than there are."""
        first = next(iter(tokens.values()))
        if not (first / f"{self.heldout}.idx").exists():
            text = f"{first} has no shard {self.heldout!r}; no loss on held-out data"
            report({"event": "warning", "text": text})
            return None, self.train
        source = Source(self.rows(first / self.heldout, 0), self.batch_rows)
        most = -(-source.length // self.batch_rows)
        return source, replace(self.train, validate_batches=min(self.train.validate_batches, most))


@dataclass(frozen=True)
class PretrainSettings(RowSettings):
    """A model from random weights, or on from the input `model`."""

    model: dict[str, Any] = field(default_factory=dict)
    """`preset: NAME`, or fields of a model, or a preset and fields that differ; the vocabulary comes from the
    tokenizer. With an input `model` nothing but max_position_embeddings.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        # What is wrong is said before anything runs; without a shape of its own it goes on from the input model.
        shaped = set(self.model) - {"max_position_embeddings"}
        config = model_config({"vocab_size": 2**17} | self.model) if shaped else None
        if config is not None and self.length > config.max_position_embeddings:
            raise UserError(
                f"length {self.length} is beyond model.max_position_embeddings {config.max_position_embeddings}; "
                "set the second to at least the first"
            )


def run(settings: PretrainSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Train on the inputs `tokens` and `tokenizer`; goes on from what it finds in `out`.

    Returns the figures of the run.
    """
    tokenizer = Tokenizer.load(inputs["tokenizer"])
    model = _begin(settings, tokenizer, inputs.get("model"))
    tokens = token_folders(inputs)
    source = blend(settings, tokens)
    report({"event": "log", "text": source.preview()})
    validation, train = settings.held_out(tokens, report)
    figures = pretrain(train, source, validation, model, out, report)
    model.save(out / "model", inputs["tokenizer"])
    return figures


def _begin(settings: PretrainSettings, tokenizer: Tokenizer, start: Path | None) -> LanguageModel:
    """Random weights in the shape of the settings, or the weights of `start`, ready for texts of `length`."""
    device = torch_device(settings.device)
    if start is None:
        return LanguageModel(fitted(settings.model, tokenizer), device=device).initialise(settings.seed)
    if wrong := sorted(set(settings.model) - {"max_position_embeddings"}):
        raise UserError(f"model.{wrong[0]} is set, but the shape is that of the input model; leave it out")
    model = LanguageModel.load(start, dtype="float32", device=device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the input model {model.config.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    longest = settings.model.get("max_position_embeddings", max(settings.length, model.config.max_position_embeddings))
    model.config = replace(model.config, max_position_embeddings=longest)
    return model


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


def token_folders(inputs: Mapping[str, Path]) -> dict[str, Path]:
    """The folders of token shards by their input's name, which is empty if there is only one."""
    return {name.partition(".")[2]: folder for name, folder in inputs.items() if name.partition(".")[0] == "tokens"}


def blend(settings: RowSettings, tokens: Mapping[str, Path]) -> Blend:
    """The order of all training data, fixed before the first step. `tokens`: what `token_folders` gives."""
    named = "" not in tokens
    prefixes = settings.blend.sources or {name or "train": "train" for name in tokens}
    for name in prefixes:
        if named and name not in tokens:
            raise UserError(f"blend.sources has {name!r}, which is no input; {nearest(name, tokens)}")
    sources = {
        name: settings.rows(tokens[name if named else ""] / prefix, settings.seed) for name, prefix in prefixes.items()
    }
    even = Phase(1.0, {name: float(rows.shards.tokens) for name, rows in sources.items()})
    batches = settings.train.steps * settings.train.accumulate
    return Blend(sources, settings.blend.phases or (even,), settings.batch_rows, batches, settings.blend.epochs)


def _value(name: str, value: Any) -> Any:
    """YAML has lists and mappings where a ModelConfig has tuples and a RopeScaling."""
    if name == "rope_scaling" and isinstance(value, dict):
        return RopeScaling(**value)
    return tuple(value) if isinstance(value, list) else value
