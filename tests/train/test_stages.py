"""The stage `pretrain`: from shards and a tokenizer to a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import CONFIG

from whimbrel import config
from whimbrel.data import shards
from whimbrel.errors import UserError
from whimbrel.model.language import LanguageModel
from whimbrel.model.presets import preset
from whimbrel.text import Tokenizer
from whimbrel.train import stages
from whimbrel.train.stages import PretrainSettings

SHAPE = {
    "pattern": CONFIG.pattern,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
}
TREE: dict[str, Any] = {
    "model": SHAPE,
    "length": 32,
    "batch_rows": 4,
    "device": "cpu",
    "train": {
        "steps": 6,
        "accumulate": 2,
        "threads": 1,
        "validate_every": 3,
        "checkpoint_every": 3,
        "tensorboard": False,
    },
}


def settings(**changes: Any) -> PretrainSettings:
    """As a recipe would give them."""
    return config.parse(PretrainSettings, TREE | changes)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer of 330 entries and two shards."""
    folder = tmp_path_factory.mktemp("inputs")
    words = [
        "the",
        "whimbrel",
        "crosses",
        "an",
        "ocean",
        "without",
        "landing",
        "and",
        "returns",
        "along",
        "the",
        "coast",
        "in",
        "spring",
    ]
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(words, 30)) for _ in range(60)]
    tokenizer = Tokenizer.train(texts, 64 + 256 + 10)
    tokenizer.save(folder / "tokenizer")
    documents = [shards.Tokens([*ids, tokenizer.eos_ids[0]], None, {}) for ids in tokenizer.encode_batch(texts)]
    for name, some in (("train", documents[:50]), ("heldout", documents[50:])):
        shards.write(folder / "tokens" / name, some, tokenizer.vocab_size)
    return {"tokens": folder / "tokens", "tokenizer": folder / "tokenizer"}


def test_a_model_folder_comes_out(inputs: dict[str, Path], tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    figures = stages.run(settings(), inputs, tmp_path, events.append)
    model, tokenizer = LanguageModel.load(tmp_path / "model"), Tokenizer.load(tmp_path / "model")
    assert model.config.vocab_size == tokenizer.vocab_size == 330
    assert model.config.eos_token_ids == tokenizer.eos_ids
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    looks = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert looks[-1] == figures["validation_loss"] < looks[0]
    assert figures["tokens"] == lines[-2]["tokens"] > 0.9 * 6 * 2 * 4 * 32
    assert any("epochs" in event.get("text", "") for event in events)
    started = LanguageModel(model.config).initialise(0).state_dict()
    assert all(not torch.equal(tensor, started[name]) for name, tensor in model.state_dict().items())


def test_it_goes_on_where_it_was_interrupted(inputs: dict[str, Path], tmp_path: Path) -> None:
    stages.run(settings(), inputs, tmp_path / "whole", lambda event: None)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event["done"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run(settings(), inputs, tmp_path / "cut", stop)
    events: list[dict[str, Any]] = []
    stages.run(settings(), inputs, tmp_path / "cut", events.append)
    assert any("going on from" in event.get("text", "") for event in events)
    whole, cut = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_the_seed_draws_weights_and_order(inputs: dict[str, Path], tmp_path: Path) -> None:
    losses = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(losses))
        stages.run(settings(seed=seed), inputs, folder, lambda event: None)
        losses.append([json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(UserError, match="the data are not those"):
        stages.run(settings(seed=1), inputs, tmp_path / "0", lambda event: None)


def test_a_blend_takes_its_sources_by_weight(inputs: dict[str, Path]) -> None:
    tree = {
        "sources": {"a": "train", "b": "heldout"},
        "phases": [{"until": 0.5, "weights": {"a": 3, "b": 1}}, {"until": 1.0, "weights": {"b": 1}}],
    }
    table = stages.blend(settings(blend=tree), {"": inputs["tokens"]}).table()
    assert [(part.phase, part.source, part.rows) for part in table] == [
        (0, "a", 18),
        (0, "b", 6),
        (1, "a", 0),
        (1, "b", 24),
    ]


def test_it_goes_on_from_another_model_over_several_inputs(inputs: dict[str, Path], tmp_path: Path) -> None:
    stages.run(settings(), inputs, tmp_path / "first", lambda event: None)
    several = {"tokens.a": inputs["tokens"], "tokens.b": inputs["tokens"], "tokenizer": inputs["tokenizer"]}
    tree = {
        "length": 64,
        "model": {"max_position_embeddings": 128},
        "blend": {"sources": {"a": "train", "b": "heldout"}},
    }
    longer = settings(**tree)
    start = LanguageModel.load(tmp_path / "first" / "model").state_dict()
    begun = stages._begin(longer, Tokenizer.load(inputs["tokenizer"]), tmp_path / "first" / "model")
    assert begun.config.max_position_embeddings == 128
    assert all(torch.equal(tensor, start[name]) for name, tensor in begun.state_dict().items())
    stages.run(longer, several | {"model": tmp_path / "first" / "model"}, tmp_path / "second", lambda event: None)
    assert LanguageModel.load(tmp_path / "second" / "model").config.max_position_embeddings == 128
    named = {"a": inputs["tokens"], "b": inputs["tokens"]}
    assert {part.source for part in stages.blend(longer, named).table()} == {"a", "b"}
    with pytest.raises(UserError, match=r"blend\.sources has 'c', which is no input"):
        stages.blend(settings(blend={"sources": {"c": "train"}}), named)
    with pytest.raises(UserError, match=r"model\.head_dim is set, but the shape is that of the input model"):
        stages.run(settings(), several | {"model": tmp_path / "first" / "model"}, tmp_path / "x", lambda event: None)


def test_no_held_out_data_is_said(inputs: dict[str, Path], tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    figures = stages.run(settings(heldout="absent"), inputs, tmp_path, events.append)
    assert "validation_loss" not in figures
    assert "no shard 'absent'" in next(event["text"] for event in events if event["event"] == "warning")


def test_a_preset_with_changes() -> None:
    made = stages.model_config({"preset": "hybrid-tiny", "hidden_size": 96, "time_step_limit": [0.0, 1.0]})
    assert (made.hidden_size, made.pattern) == (96, preset("hybrid-tiny").pattern)
    assert made.time_step_limit == (0.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"preset": "hybrid-tiney"}}, "did you mean 'hybrid-tiny'"),
        ({"model": SHAPE | {"hiden_size": 3}}, "unknown setting model.hiden_size; did you mean 'hidden_size'"),
        ({"model": {"hidden_size": 16}}, "model.pattern is missing"),
        ({"model": SHAPE | {"pattern": "M-Q"}}, "'Q' at layer 2"),
        ({"model": SHAPE | {"max_position_embeddings": 31}}, "length 32 is beyond model.max_position_embeddings 31"),
        ({"length": 0}, "length is 0"),
        ({"device": "gpu"}, "set device to auto, cpu or cuda"),
        ({"train": {"stepz": 3}}, "did you mean train.steps"),
    ],
)
def test_mistakes_are_named_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**changes)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(inputs: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(inputs["tokenizer"])
    with pytest.raises(UserError, match=r"model\.vocab_size is 300, the tokenizer has 330"):
        stages.fitted(SHAPE | {"vocab_size": 300}, tokenizer)
    assert stages.fitted(SHAPE | {"vocab_size": 384}, tokenizer).vocab_size == 384


def test_settings_go_to_yaml_and_back(tmp_path: Path) -> None:
    config.save(settings(), tmp_path / "settings.yaml")
    assert config.load(PretrainSettings, tmp_path / "settings.yaml") == settings()
