"""One small network of every family, with no parameter at 0 or 1, and rows to show them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from whimbrel.compress.prune import Units
from whimbrel.data.pack import Batch
from whimbrel.model.config import ATTENTION, MAMBA, ModelConfig
from whimbrel.model.language import LanguageModel

HYBRID = ModelConfig(
    pattern="M-M*-M-",
    vocab_size=37,
    hidden_size=24,
    intermediate_size=20,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=8,
    mamba_num_heads=6,
    mamba_head_dim=5,
    ssm_state_size=7,
    n_groups=2,
    conv_kernel=3,
    mamba_bias=True,
    mlp_bias=True,
    norm_eps=1e-20,
)
LLAMA = replace(
    HYBRID,
    pattern="*-*-*-",
    mlp="swiglu",
    rope_theta=1e4,
    tie_embeddings=True,
    attention_bias=True,
    family="llama",
)
NETS = {
    "hybrid": HYBRID,
    "hybrid, plain": replace(HYBRID, mamba_bias=False, mlp_bias=False, tie_embeddings=True),
    "llama": LLAMA,
    "qwen3": replace(LLAMA, family="qwen3", qk_norm=True, mlp_bias=False, tie_embeddings=False),
    "nemotron": replace(LLAMA, family="nemotron", norm="layernorm1p", mlp="relu2", mlp_bias=False, rope_fraction=0.5),
}


def net(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """Random weights, all of them spread."""
    model = LanguageModel(config, dtype=dtype).initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def rows(config: ModelConfig, count: int, seed: int = 0) -> list[Batch]:
    """Rows of three documents each."""
    draw, made = np.random.default_rng(seed), []
    for step in range(count):
        lengths = tuple(draw.integers(2, 9, 3).tolist())
        documents = [draw.integers(config.vocab_size, size=length) for length in lengths]
        targets = [np.append(document[1:], -100) for document in documents]
        made.append(Batch(np.concatenate(documents), np.concatenate(targets), lengths, step))
    return made


def everything(config: ModelConfig) -> Units:
    """Every unit where it is."""
    kinds = {
        MAMBA: (config.mamba_num_heads, config.mamba_head_dim),
        ATTENTION: (config.num_key_value_heads, config.num_attention_heads),
    }
    inside = {
        layer: tuple(torch.arange(n) for n in kinds.get(letter, (config.intermediate_size,)))
        for layer, letter in enumerate(config.pattern)
    }
    return Units(tuple(range(config.layers)), torch.arange(config.hidden_size), inside)
