"""Small networks and a vocabulary of bytes, shared by the tests of this room."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

from whimbrel.model import LanguageModel, ModelConfig
from whimbrel.text import Tokenizer

settings.register_profile("shared-cores", deadline=None)  # a neighbour's work is no failure of ours
settings.load_profile("shared-cores")

VOCABULARY = 320
HYBRID = ModelConfig(
    pattern="M*-MM-*",
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=6,
    mamba_head_dim=8,
    ssm_state_size=10,
    n_groups=2,
)
DENSE = ModelConfig(
    pattern="*-*-",
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    mlp="swiglu",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    qk_norm=True,
    rope_theta=1e4,
    tie_embeddings=True,
    family="qwen3",
)


def random_model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A network in float32 in which no parameter is trivial, with answers that depend on the whole prompt."""
    model = LanguageModel(config).initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "A_log" not in name and "dt_bias" not in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "conv" not in name and parameter.dim() == 2:
                parameter.mul_(8)
    return model


@pytest.fixture(scope="session", params=[HYBRID, DENSE], ids=["hybrid", "dense"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return random_model(request.param)


@pytest.fixture(scope="session")
def hybrid() -> LanguageModel:
    return random_model(HYBRID)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """64 reserved ids and the 256 bytes: a character is a token, and a thinking tag is several."""
    return Tokenizer.train(["whimbrel"], VOCABULARY)


@pytest.fixture(scope="session")
def speaker(tokenizer: Tokenizer) -> Callable[[str], LanguageModel]:
    """Networks that write a given text round and round: after each of its characters (all different) the next."""
    config = ModelConfig(pattern="-", vocab_size=VOCABULARY, hidden_size=VOCABULARY, intermediate_size=1)

    def make(text: str) -> LanguageModel:
        ids = tokenizer.encode(text)
        assert len(set(ids)) == len(ids), "a character may occur once"
        model = LanguageModel(config).initialise(0)
        with torch.no_grad():
            for parameter in model.layers[0].mixer.parameters():
                parameter.zero_()
            model.embeddings.weight.copy_(torch.eye(VOCABULARY))
            model.head.weight.zero_()
            for now, following in zip(ids, [*ids[1:], ids[0]], strict=True):
                model.head.weight[following, now] = 1.0
        return model

    return make


@pytest.fixture(scope="session")
def make_model() -> Callable[[ModelConfig, int], LanguageModel]:
    return random_model
