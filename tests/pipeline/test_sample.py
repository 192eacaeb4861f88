"""Samples can be drawn again, and a model that is read is the model that was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from whimbrel.config import parse
from whimbrel.errors import UserError
from whimbrel.events import silent
from whimbrel.model import LanguageModel, ModelConfig
from whimbrel.pipeline import probe, sample
from whimbrel.text import Tokenizer

CONFIG = ModelConfig(
    pattern="M*-",
    vocab_size=360,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    mamba_num_heads=4,
    mamba_head_dim=16,
    ssm_state_size=8,
    n_groups=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with every parameter away from where it starts."""
    place = tmp_path_factory.mktemp("model")
    texts = ["the table of the function returns a list of the values"] * 4 + ["in python, a module is a file"] * 4
    Tokenizer.train(texts, CONFIG.vocab_size).save(place / "tokenizer")
    model = LanguageModel(CONFIG).initialise(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save(place / "model", place / "tokenizer")
    return place / "model"


def write(folder: Path, out: Path, **settings: object) -> dict[str, object]:
    out.mkdir()
    tree = {"prompts": ["the function", "a module"], "max_tokens": 8, **settings}
    seen = sample.run(parse(sample.SampleSettings, tree), {"model": folder}, out, silent)
    return {"metrics": seen, **json.loads((out / "samples.json").read_text())}


def test_samples_can_be_drawn_again(folder: Path, tmp_path: Path) -> None:
    first = write(folder, tmp_path / "a", seed=5)
    again = write(folder, tmp_path / "b", **first["settings"])  # type: ignore[arg-type]
    other = write(folder, tmp_path / "c", seed=6)
    assert again == first
    assert other["samples"] != first["samples"]
    assert [entry["trained"]["seed"] for entry in first["samples"]] == [5, 6]  # type: ignore[attr-defined]
    assert first["metrics"] == {"samples": 2, "tokens": 16}


def test_untrained_weights_write_beside_it(folder: Path, tmp_path: Path) -> None:
    found = write(folder, tmp_path / "a", untrained=True)["samples"]
    assert all(entry["trained"]["text"] != entry["untrained"]["text"] for entry in found)  # type: ignore[attr-defined]


def test_settings_reach_the_sampler(folder: Path, tmp_path: Path) -> None:
    greedy = [write(folder, tmp_path / f"{seed}", temperature=0, seed=seed)["samples"] for seed in (0, 9)]
    texts = [[entry["trained"]["text"] for entry in found] for found in greedy]  # type: ignore[attr-defined]
    assert texts[0] == texts[1]
    narrow = write(folder, tmp_path / "narrow", top_k=1, seed=0)["samples"]
    assert [entry["trained"]["text"] for entry in narrow] == texts[0]  # type: ignore[attr-defined]
    most = write(folder, tmp_path / "long", max_tokens=3)
    assert most["metrics"] == {"samples": 2, "tokens": 6}


def test_no_prompts_and_no_sense() -> None:
    for name, value in {"prompts": [], "temperature": -1, "top_p": 0, "max_tokens": 0, "repetition_penalty": 0}.items():
        with pytest.raises(UserError, match=name):
            parse(sample.SampleSettings, {"prompts": ["a"], name: value})


def test_a_probe_knows_its_model_and_no_other(folder: Path, tmp_path: Path) -> None:
    taken = json.loads(json.dumps(probe.take(folder)))
    probe.check(folder, taken)
    assert taken["shape"]["parameters"] == sum(p.numel() for p in LanguageModel(CONFIG).parameters())
    model = LanguageModel.load(folder)
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        changed = LanguageModel.load(folder)
        with torch.no_grad():
            dict(changed.named_parameters())[name].mul_(1.02)
        changed.save(tmp_path / name, folder)
        with pytest.raises(UserError, match="does not give the logits"):
            probe.check(tmp_path / name, taken)
