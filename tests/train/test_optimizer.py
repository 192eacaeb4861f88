"""Which parameters decay, and that none is forgotten."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_run import CONFIG, tiny_model
from torch import nn

from whimbrel.errors import UserError
from whimbrel.model.config import ModelConfig
from whimbrel.model.language import LanguageModel
from whimbrel.train.optimizer import OptimizerSettings, adamw, decays

WITH_EVERYTHING = replace(
    CONFIG, mlp="swiglu", mlp_bias=True, attention_bias=True, mamba_bias=True, qk_norm=True, norm="layernorm1p"
)


def test_matrices_decay_and_nothing_else_does() -> None:
    names = {name for name, _ in LanguageModel(WITH_EVERYTHING, device="meta").named_parameters()}
    pulled = {name for name in names if decays(name)}
    leaves = {name.split(".", 2)[-1] if name.startswith("layers.") else name for name in pulled}
    projections = {f"mixer.{name}_proj.weight" for name in ("in", "out", "q", "k", "v", "o", "gate", "up", "down")}
    assert leaves == projections | {"embeddings.weight", "head.weight", "mixer.conv_weight"}
    assert {"layers.0.mixer.A_log", "layers.0.mixer.D", "layers.0.mixer.dt_bias", "norm_f.weight"} <= names - pulled


@pytest.mark.parametrize("config", [CONFIG, WITH_EVERYTHING, replace(CONFIG, tie_embeddings=True)])
def test_every_parameter_is_in_one_group(config: ModelConfig) -> None:
    model = LanguageModel(config).initialise(0)
    grouped = [id(p) for group in adamw(model, OptimizerSettings()).param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_an_unknown_name_stops_a_programmer() -> None:
    model = nn.Module()
    model.register_parameter("novelty", nn.Parameter(torch.zeros(3)))
    with pytest.raises(AssertionError, match="novelty"):
        adamw(model, OptimizerSettings())


def test_frozen_parameters_are_left_out() -> None:
    model = tiny_model()
    model.embeddings.weight.requires_grad_(False)
    grouped = [id(p) for group in adamw(model, OptimizerSettings()).param_groups for p in group["params"]]
    assert id(model.embeddings.weight) not in grouped
    assert len(grouped) == len(list(model.parameters())) - 1


def test_one_step_is_that_of_the_paper() -> None:
    """arXiv 1711.05101, algorithm 2: the decay is apart from the moments."""
    model, settings = tiny_model(), OptimizerSettings(learning_rate=0.02, beta1=0.8, beta2=0.9, weight_decay=0.3)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    gradients = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    adamw(model, settings).step()
    for name, parameter in model.named_parameters():
        gradient = gradients[name]
        decay = 0.3 if decays(name) else 0.0
        mean, square = 0.2 * gradient / (1 - 0.8), 0.1 * gradient**2 / (1 - 0.9)
        expected = before[name] * (1 - 0.02 * decay) - 0.02 * mean / (square.sqrt() + 1e-8)
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"weight_decay": float("nan")},
        {"beta2": 1.0},
        {"eps": 0.0},
        {"weight_decay": -1.0},
    ],
)
def test_mistakes_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        OptimizerSettings(**wrong)
