"""Shapes by name: the published models, and small ones of our own.

Sources: Nemotron-H (arXiv 2504.03624), Nemotron Nano 2 (arXiv 2508.14444), Nemotron-4 15B (arXiv 2402.16819) and 340B
(arXiv 2406.11704), and for the rest the `config.json` of the released checkpoint. Where a paper and its checkpoint
disagree (47B: layer counts; Nano 2: 128 Mamba heads of 80, printed as 64) the checkpoint is followed.
"""

from __future__ import annotations

from dataclasses import replace

from whimbrel.errors import UserError, nearest
from whimbrel.model.config import ModelConfig, RopeScaling

_H_8B = ModelConfig(
    pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    vocab_size=131072,
    hidden_size=4096,
    intermediate_size=21504,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    mamba_num_heads=128,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=8,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_H_56B = replace(
    _H_8B,
    pattern="M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-",
    hidden_size=8192,
    intermediate_size=32768,
    num_attention_heads=64,
    mamba_num_heads=256,
    ssm_state_size=256,
)
_NANO_12B = replace(
    _H_8B,
    pattern="M-M-M-M*-" * 6 + "M-M-M-M-",
    hidden_size=5120,
    intermediate_size=20480,
    num_attention_heads=40,
    mamba_head_dim=80,
    max_position_embeddings=131072,
    eos_token_id=12,
)
_NEMOTRON_15B = ModelConfig(
    pattern="*-" * 32,
    vocab_size=256000,
    hidden_size=6144,
    intermediate_size=24576,
    num_attention_heads=48,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=10000.0,
    rope_fraction=0.5,
    norm="layernorm1p",
    max_position_embeddings=4096,
    initializer_range=0.0134,
    rescale_prenorm_residual=False,
    bos_token_id=2,
    eos_token_id=3,
    family="nemotron",
)
_LLAMA_8B = ModelConfig(
    pattern="*-" * 32,
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    mlp="swiglu",
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    max_position_embeddings=131072,
    rescale_prenorm_residual=False,
    bos_token_id=128000,
    eos_token_id=128001,
    family="llama",
)
_QWEN3_8B = replace(
    _LLAMA_8B,
    pattern="*-" * 36,
    vocab_size=151936,
    intermediate_size=12288,
    qk_norm=True,
    rope_theta=1000000.0,
    rope_scaling=None,
    norm_eps=1e-6,
    max_position_embeddings=40960,
    bos_token_id=151643,
    eos_token_id=151645,
    family="qwen3",
)
_SMOLLM2_135M = replace(
    _LLAMA_8B,
    pattern="*-" * 30,
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rope_theta=100000.0,
    rope_scaling=None,
    tie_embeddings=True,
    max_position_embeddings=8192,
    initializer_range=1 / 24,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
_HYBRID_TINY = replace(
    _H_8B,
    pattern="M-M-M*-M-",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=256,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    mamba_num_heads=4,
    mamba_head_dim=32,
    ssm_state_size=16,
    n_groups=2,
    chunk_size=16,
    tie_embeddings=True,
    max_position_embeddings=2048,
)
_HYBRID_290M = replace(
    _H_8B,
    pattern="M-M-M-M*-M-M-M-M*-M-M-M-M-M-",
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=8,
    num_key_value_heads=2,
    mamba_num_heads=32,
    max_position_embeddings=32768,
)
_DENSE_283M = replace(
    _QWEN3_8B,
    pattern="*-" * 18,
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=3072,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)

PRESETS: dict[str, ModelConfig] = {
    "nemotron-h-4b": replace(
        _H_8B, hidden_size=3072, intermediate_size=12288, num_attention_heads=32, mamba_num_heads=112
    ),
    "nemotron-h-8b": _H_8B,
    "nemotron-h-47b": replace(
        _H_56B,
        pattern="M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-",
        intermediate_size=30720,
    ),
    "nemotron-h-56b": _H_56B,
    "nemotron-nano-12b-v2": _NANO_12B,
    "nemotron-nano-9b-v2": replace(
        _NANO_12B,
        pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        hidden_size=4480,
        intermediate_size=15680,
    ),
    "nemotron-4-15b": _NEMOTRON_15B,
    "nemotron-4-340b": replace(
        _NEMOTRON_15B,
        pattern="*-" * 96,
        hidden_size=18432,
        intermediate_size=73728,
        num_attention_heads=96,
        head_dim=192,
        initializer_range=0.0063,
    ),
    "qwen3-8b": _QWEN3_8B,
    "llama-3.1-8b": _LLAMA_8B,
    "smollm2-135m": _SMOLLM2_135M,
    # Ours: two hybrids that train on two cores in minutes, one to measure speed with, and dense twins.
    "hybrid-tiny": _HYBRID_TINY,
    "hybrid-1m": replace(
        _HYBRID_TINY,
        hidden_size=128,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_num_heads=8,
        ssm_state_size=32,
    ),
    "hybrid-290m": _HYBRID_290M,
    "dense-tiny": replace(
        _DENSE_283M,
        pattern="*-" * 4,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=280,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_embeddings=True,
        max_position_embeddings=2048,
    ),
    "dense-283m": _DENSE_283M,
}


def preset(name: str) -> ModelConfig:
    """The shape of this name; an unknown name raises `UserError` with the nearest one."""
    if name not in PRESETS:
        raise UserError(f"no preset is called {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]
