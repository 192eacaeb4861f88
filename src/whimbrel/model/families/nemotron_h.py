"""Nemotron-H and Nano 2: Mamba-2, attention and feed-forward layers in any order (arXiv 2504.03624, 2508.14444).

Read: the string `hybrid_override_pattern` and both generations of the list `layers_block_type`. Written: the string
with `num_hidden_layers`, and no mixture-of-experts key, which is what transformers and vLLM both read.
Ignored, as the published models ignore them: `expand`, `mamba_proj_bias`, rotary keys, `residual_in_fp32`, and the
mixture-of-experts keys that transformers 5 writes into dense configs too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from whimbrel.errors import UserError, nearest
from whimbrel.model.config import ModelConfig
from whimbrel.model.families.classic import mixer_names
from whimbrel.model.families.fields import Fields, expressible, ids_to_hf, limit

FIXED = {"norm": "rmsnorm", "mlp": "relu2", "qk_norm": False, "rope_theta": None, "attention_bias": False}
LETTERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}


def config_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The config of a folder; `UserError` names every value that this package would compute differently."""
    fields = Fields(raw, where)
    fields.only("mlp_hidden_act", "relu2")
    fields.only("mamba_hidden_act", "silu")
    fields.only("sliding_window", None)
    fields.only("num_nextn_predict_layers", 0, "whose multi-token-prediction layers are not computed here")
    pattern = _pattern(fields)
    attention = {
        "num_attention_heads": fields.get("num_attention_heads", default=0),
        "num_key_value_heads": fields.get("num_key_value_heads", "num_attention_heads", default=0),
        "head_dim": fields.get("head_dim", "attention_head_dim", default=0),
        "attention_bias": fields.get("attention_bias", default=False),
    }
    mamba = {
        "mamba_num_heads": fields.get("mamba_num_heads", default=0),
        "mamba_head_dim": fields.get("mamba_head_dim", default=0),
        "ssm_state_size": fields.get("ssm_state_size", "mamba_d_state", default=0),
        "n_groups": fields.get("mamba_n_groups", "n_groups", default=8),
        "conv_kernel": fields.get("mamba_d_conv", "conv_kernel", default=4),
        "conv_bias": fields.get("mamba_conv_bias", "use_conv_bias", default=True),
        "mamba_bias": fields.get("use_bias", default=False),
        "chunk_size": fields.get("mamba_chunk_size", "chunk_size", default=128),
        "time_step_min": fields.get("mamba_dt_min", "time_step_min", default=0.001),
        "time_step_max": fields.get("mamba_dt_max", "time_step_max", default=0.1),
        "time_step_floor": fields.get("mamba_dt_init_floor", "time_step_floor", default=1e-4),
        "time_step_limit": limit(fields.get("mamba_dt_limit", "time_step_limit", default=(0.0, math.inf)), where),
    }
    return ModelConfig(
        family="nemotron_h",
        pattern=pattern,
        vocab_size=fields.get("vocab_size"),
        hidden_size=fields.get("hidden_size"),
        intermediate_size=fields.get("intermediate_size", default=0),
        mlp_bias=fields.get("mlp_bias", default=False),
        norm_eps=fields.get("layer_norm_epsilon", "rms_norm_eps", "norm_eps"),
        tie_embeddings=fields.get("tie_word_embeddings", default=False),
        max_position_embeddings=fields.get("max_position_embeddings"),
        initializer_range=fields.get("initializer_range", default=0.02),
        rescale_prenorm_residual=fields.get("rescale_prenorm_residual", default=True),
        bos_token_id=fields.ids("bos_token_id", 1),
        eos_token_id=fields.ids("eos_token_id", 2),
        pad_token_id=fields.ids("pad_token_id", 0),
        **attention,
        **mamba,
    )


def _pattern(fields: Fields) -> str:
    """One letter a layer, from whichever spelling the file has; both must agree where both are there."""
    words = fields.get("layers_block_type", "layer_types", default=())
    for word in words:
        if word not in LETTERS:
            raise UserError(
                f"{fields.where} has a layer of type {word!r} in layers_block_type; {nearest(str(word), LETTERS)}"
            )
    listed = "".join(LETTERS[word] for word in words)
    pattern = fields.get("hybrid_override_pattern", default=listed or None)
    if pattern is None:
        raise UserError(
            f"{fields.where} has no hybrid_override_pattern and no layers_block_type; add the string, like M-M*-"
        )
    if listed and listed != pattern:
        raise UserError(
            f"{fields.where}: hybrid_override_pattern {pattern!r} and layers_block_type ({listed}) differ; remove one"
        )
    if "E" in pattern:
        raise UserError(
            f"{fields.where} has mixture-of-experts layers (E at layer {pattern.index('E')}), not computed here; "
            "read are patterns of M, * and -"
        )
    layers = fields.get("num_hidden_layers", default=len(pattern))
    if layers != len(pattern):
        raise UserError(
            f"{fields.where} says num_hidden_layers {layers}, but its pattern has {len(pattern)}; set it to that"
        )
    return str(pattern)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a hybrid; `UserError` if the family cannot say it. Sizes of absent layers are left out."""
    expressible(config, FIXED)
    said = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": config.pattern,
        "num_hidden_layers": config.layers,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "mamba_num_heads": config.mamba_num_heads,
        "mamba_head_dim": config.mamba_head_dim,
        "ssm_state_size": config.ssm_state_size,
    }
    said = {name: value for name, value in said.items() if value != 0}
    said |= {
        "n_groups": config.n_groups,
        "conv_kernel": config.conv_kernel,
        "use_conv_bias": config.conv_bias,
        "use_bias": config.mamba_bias,
        "chunk_size": config.chunk_size,
        "time_step_min": config.time_step_min,
        "time_step_max": config.time_step_max,
        "time_step_floor": config.time_step_floor,
        "mamba_hidden_act": "silu",
        "mamba_ssm_cache_dtype": "float32",
        "mlp_hidden_act": "relu2",
        "mlp_bias": config.mlp_bias,
        "attention_bias": False,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rescale_prenorm_residual": config.rescale_prenorm_residual,
        **ids_to_hf(config),
    }
    if config.time_step_limit != (0.0, math.inf):  # the default of every reader; JSON itself has no infinity
        said["time_step_limit"] = list(config.time_step_limit)
    return said


def names(config: ModelConfig) -> dict[str, str]:
    """Our name -> the name in the file, for every tensor of the network."""
    table = {"embeddings.weight": "backbone.embeddings.weight", "norm_f.weight": "backbone.norm_f.weight"}
    if not config.tie_embeddings:
        table["head.weight"] = "lm_head.weight"
    mamba = {name: name for name in ("in_proj.weight", "A_log", "D", "dt_bias", "out_proj.weight")}
    mamba |= {"conv_weight": "conv1d.weight", "norm_weight": "norm.weight"}
    if config.conv_bias:
        mamba["conv_bias"] = "conv1d.bias"
    if config.mamba_bias:
        mamba |= {"in_proj.bias": "in_proj.bias", "out_proj.bias": "out_proj.bias"}
    for layer, letter in enumerate(config.pattern):
        place = f"backbone.layers.{layer}"
        table[f"layers.{layer}.norm.weight"] = f"{place}.norm.weight"
        mixer = mamba if letter == "M" else mixer_names(config, letter)
        table |= {f"layers.{layer}.mixer.{ours}": f"{place}.mixer.{theirs}" for ours, theirs in mixer.items()}
    return table
