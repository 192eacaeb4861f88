"""Adapters: attached they change nothing, trained they alone change, merged they are still the same function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_world import LOOP, network

from whimbrel import config
from whimbrel.align import lora
from whimbrel.align.lora import LoraSettings
from whimbrel.align.sft import SftSettings
from whimbrel.align.sft import run as tune
from whimbrel.errors import UserError
from whimbrel.events import silent
from whimbrel.model import LanguageModel, ModelConfig
from whimbrel.train.optimizer import OptimizerSettings, adamw

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def spread(model: LanguageModel) -> LanguageModel:
    """Adapters with nothing at 0."""
    with torch.no_grad():
        for _, module in lora.adapters(model):
            module.lora_B.normal_(generator=torch.Generator().manual_seed(1))
    model.touch()
    return model


def test_attached_a_model_is_the_model_and_only_adapters_learn() -> None:
    model, plain = lora.attach(network(), LoraSettings(rank=4), 0), network()
    assert torch.equal(model(TOKENS), plain(TOKENS))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{side}" for name, _ in lora.adapters(model) for side in "AB"}
    assert {name.rpartition(".")[2] for name, _ in lora.adapters(model)} == {
        "in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"
    }  # fmt: skip
    model(TOKENS).sum().backward()
    assert all((p.grad is not None) == (name in trained) for name, p in model.named_parameters())
    assert len(adamw(model, OptimizerSettings()).param_groups[0]["params"]) == len(trained)


def test_an_adapter_adds_its_scaled_product() -> None:
    """W x + alpha / rank B A x, against the sum of two matrices."""
    model, plain = spread(lora.attach(network(), LoraSettings(rank=2, alpha=3.0, targets=("q_proj",)), 0)), network()
    ((name, adapter),) = lora.adapters(model)
    with torch.no_grad():
        plain.get_submodule(name).weight += 1.5 * adapter.lora_B @ adapter.lora_A  # type: ignore[operator]
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), atol=1e-5, rtol=1e-5)


def test_merged_a_model_is_plain_and_the_same_function() -> None:
    model = spread(lora.attach(network(), LoraSettings(rank=4), 0))
    attached = model(TOKENS)
    lora.merge(model)
    torch.testing.assert_close(model(TOKENS), attached, atol=1e-4, rtol=1e-4)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in network().named_parameters()}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_decoding_sees_the_adapters() -> None:
    """The native form of a step keeps pointers to weights; it must not keep those of a model without adapters."""
    from small_world import vocabulary

    from whimbrel.engine import Engine, Sampling

    model, merged = network(), lora.merge(spread(lora.attach(network(), LoraSettings(rank=4), 0)))
    engine = Engine(model, vocabulary())
    before = next(engine.generate(["abc"], Sampling(8)))
    spread(lora.attach(model, LoraSettings(rank=4), 0))
    after = next(engine.generate(["abc"], Sampling(8)))
    assert after.ids == next(Engine(merged, vocabulary()).generate(["abc"], Sampling(8))).ids != before.ids


def test_saved_as_peft_saves(tmp_path: Path) -> None:
    settings = LoraSettings(rank=4, alpha=8.0, targets=("q_proj", "in_proj"))
    model = spread(lora.attach(network(), settings, 0))
    lora.save(model, tmp_path / "adapter", settings, "base")
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["peft_type"] == "LORA" and about["task_type"] == "CAUSAL_LM" and about["bias"] == "none"
    assert (about["r"], about["lora_alpha"], about["target_modules"]) == (4, 8.0, ["in_proj", "q_proj"])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    wanted = {f"base_model.model.backbone.layers.{layer}.mixer.{leaf}.lora_{side}.weight"
              for layer, leaf in ((0, "in_proj"), (1, "q_proj"), (3, "in_proj")) for side in "AB"}  # fmt: skip
    assert tensors.keys() == wanted
    for name, module in lora.adapters(model):
        assert torch.equal(tensors[f"base_model.model.backbone.{name}.lora_A.weight"], module.lora_A)
        assert torch.equal(tensors[f"base_model.model.backbone.{name}.lora_B.weight"], module.lora_B)


def test_of_a_llama_everything_has_the_name_that_peft_gives_it(tmp_path: Path) -> None:
    """Names and shapes by hand; tests/parity/test_peft.py loads such a folder where PEFT is installed."""
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "head_dim": 4}
    config = ModelConfig(pattern="*-*-", **shape, num_key_value_heads=2, mlp="swiglu", rope_theta=1e4, family="llama")
    settings = LoraSettings(rank=2)
    lora.save(lora.attach(LanguageModel(config).initialise(0), settings, 0), tmp_path / "a", settings, "base")
    found = {name: tuple(t.shape) for name, t in load_file(tmp_path / "a" / "adapter_model.safetensors").items()}
    sizes = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (16, 8), "self_attn.v_proj": (16, 8),
             "self_attn.o_proj": (16, 16), "mlp.gate_proj": (16, 24), "mlp.up_proj": (16, 24),
             "mlp.down_proj": (24, 16)}  # fmt: skip
    wanted = {}
    for block in (0, 1):
        for leaf, (inputs, outputs) in sizes.items():
            theirs = f"base_model.model.model.layers.{block}.{leaf}"
            wanted |= {f"{theirs}.lora_A.weight": (2, inputs), f"{theirs}.lora_B.weight": (outputs, 2)}
    assert found == wanted
    about = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert about["target_modules"] == sorted(leaf.rpartition(".")[2] for leaf in sizes)


def test_a_tuned_adapter_and_the_model_it_is_merged_into(world: dict[str, Path], tmp_path: Path) -> None:
    said = {"length": 256, "device": "cpu", "lora": {"rank": 4, "alpha": 8.0}, "train": LOOP | {"steps": 6}}
    tune(config.parse(SftSettings, said), world, tmp_path, silent)
    before, after = LanguageModel.load(world["model"]), LanguageModel.load(tmp_path / "model")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    changed = 0
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        theirs = f"base_model.model.backbone.{name.removesuffix('.weight')}.lora_"
        moved = (
            2.0 * tensors[f"{theirs}B.weight"] @ tensors[f"{theirs}A.weight"] if f"{theirs}A.weight" in tensors else 0
        )
        torch.testing.assert_close(b, a + moved)
        changed += not torch.equal(a, b)
    assert changed == len(tensors) / 2


def test_a_target_that_no_layer_has() -> None:
    with pytest.raises(UserError, match="fit no projection of this model"):
        lora.attach(network(), LoraSettings(targets=("gate_proj",)), 0)
