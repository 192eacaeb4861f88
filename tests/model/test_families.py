"""config.json of four families: every spelling that exists, both ways; what is not computed here is refused by name."""

import json
import math
from dataclasses import replace

import pytest

from whimbrel.errors import UserError
from whimbrel.model import LanguageModel, ModelConfig, RopeScaling, families
from whimbrel.model.presets import PRESETS, preset

HYBRID = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-MM*--",
    "num_hidden_layers": 7,
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 28,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "mamba_num_heads": 24,
    "mamba_head_dim": 6,
    "ssm_state_size": 12,
    "n_groups": 8,
    "conv_kernel": 3,
    "chunk_size": 64,
    "use_conv_bias": False,
    "time_step_min": 0.002,
    "time_step_max": 0.2,
    "time_step_floor": 2e-4,
    "time_step_limit": [0.0, math.inf],
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 512,
    "expand": 2,
}
OLD_WORDS = ["mamba", "mlp", "mamba", "mamba", "attention", "mlp", "mlp"]
NEW_WORDS = ["linear_attention", "mlp", "linear_attention", "linear_attention", "full_attention", "mlp", "mlp"]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "max_position_embeddings": 1024,
    "hidden_act": "silu",
}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 16, "rope_scaling": None}
NEMOTRON = {**QWEN3, "model_type": "nemotron", "norm_eps": 1e-5, "hidden_act": "relu2"}


def without(raw, *names, **more):
    return {name: value for name, value in raw.items() if name not in names} | more


def test_the_published_hybrid_config_is_our_preset():
    """The fields of Nano-9B-v2's file as its first readers wrote it, inert ones and all."""
    pattern = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
    sizes = {"hidden_size": 4480, "intermediate_size": 15680, "num_attention_heads": 40, "num_key_value_heads": 8}
    sizes |= {"mamba_num_heads": 128, "mamba_head_dim": 80, "ssm_state_size": 128, "n_groups": 8, "vocab_size": 131072}
    inert = {
        "expand": 2,
        "time_step_rank": 512,
        "residual_in_fp32": False,
        "mamba_proj_bias": False,
        "rope_theta": 10000,
    }
    raw = {"model_type": "nemotron_h", "hybrid_override_pattern": pattern, "num_hidden_layers": 56, **sizes, **inert}
    raw |= {"attention_head_dim": 128, "rms_norm_eps": 1e-5, "sliding_window": None, "max_position_embeddings": 131072}
    ours = families.config_from_hf(raw | {"eos_token_id": 12, "time_step_limit": [0.0, {"__float__": "Infinity"}]})
    assert ours == preset("nemotron-nano-9b-v2")


@pytest.mark.parametrize(
    "raw",
    [
        without(HYBRID, "head_dim", attention_head_dim=10),
        without(HYBRID, "layer_norm_epsilon", rms_norm_eps=1e-6),
        without(HYBRID, "time_step_limit"),
        HYBRID | {"time_step_limit": [0.0, {"__float__": "Infinity"}]},
        HYBRID | {"time_step_limit": [0, None]},
        HYBRID | {"n_groups": 1, "mamba_n_groups": 8},
        without(HYBRID, "conv_kernel", "chunk_size", mamba_d_conv=3, mamba_chunk_size=64),
        without(HYBRID, "use_conv_bias", mamba_conv_bias=False),
        without(HYBRID, "time_step_min", "time_step_max", mamba_dt_min=0.002, mamba_dt_max=0.2),
        without(HYBRID, "time_step_floor", mamba_dt_init_floor=2e-4, mamba_expand=4),
        without(HYBRID, "num_hidden_layers"),
        without(HYBRID, "hybrid_override_pattern", layers_block_type=OLD_WORDS),
        without(HYBRID, "hybrid_override_pattern", "num_hidden_layers", layer_types=NEW_WORDS),
        HYBRID | {"num_experts_per_tok": 2, "n_routed_experts": 8, "moe_intermediate_size": 7688, "n_group": 1},
        HYBRID | {"num_nextn_predict_layers": 0, "mtp_layers_block_type": ["full_attention", "moe"]},
        HYBRID | {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "attention_dropout": 0.1},
    ],
)
def test_spellings_of_a_hybrid(raw):
    assert families.config_from_hf(raw) == families.config_from_hf(HYBRID)
    assert families.config_from_hf(raw).time_step_limit == (0.0, math.inf)


@pytest.mark.parametrize(
    "raw",
    [
        without(LLAMA, "rope_theta", "rope_scaling", rope_parameters=LLAMA["rope_scaling"] | {"rope_theta": 5e5}),
        LLAMA | {"rope_scaling": without(LLAMA["rope_scaling"], "rope_type", type="llama3")},
        LLAMA | {"head_dim": 8, "mlp_bias": False, "attention_bias": None, "pretraining_tp": 2},
    ],
)
def test_spellings_of_llama(raw):
    assert families.config_from_hf(raw) == families.config_from_hf(LLAMA)
    assert families.config_from_hf(raw).rope_scaling == RopeScaling(8.0, 1.0, 4.0, 128)


def test_partial_rotary_in_every_place():
    assert families.config_from_hf(NEMOTRON).rope_fraction == 0.5  # Nemotron-4's default
    for raw in (
        NEMOTRON | {"partial_rotary_factor": 0.25},
        NEMOTRON | {"rope_percent": 0.25},
        NEMOTRON | {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.25}},
    ):
        assert families.config_from_hf(raw).rope_fraction == 0.25
        assert families.config_from_hf(raw).rope_theta == 5e5


def test_absent_token_ids_mean_what_the_family_means_and_null_means_none():
    assert families.config_from_hf(LLAMA).eos_token_id == 2
    assert families.config_from_hf(LLAMA | {"eos_token_id": None}).eos_token_id is None
    assert families.config_from_hf(LLAMA | {"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert families.config_from_hf(NEMOTRON).eos_token_id == 3
    assert families.config_from_hf(QWEN3).eos_token_id is None


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_comes_back_from_its_own_file(name):
    config = preset(name)
    said = json.loads(json.dumps(families.config_to_hf(config), allow_nan=False))
    assert families.config_from_hf(said) == config


@pytest.mark.parametrize(
    "config",
    [families.config_from_hf(HYBRID | {"use_bias": True, "mlp_bias": True, "tie_word_embeddings": True})]
    + [families.config_from_hf(raw | {"attention_bias": True}) for raw in (LLAMA, QWEN3, NEMOTRON)]
    + [
        families.config_from_hf(HYBRID),
        families.config_from_hf(LLAMA | {"mlp_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_the_name_map_is_the_model(config):
    table = families.names(config)
    assert set(table) == set(LanguageModel(config, device="meta").state_dict())
    assert len(set(table.values())) == len(table)
    assert families.config_from_hf(families.config_to_hf(config)) == config


def test_what_we_write_for_a_hybrid_has_the_string_and_nothing_of_experts():
    said = families.config_to_hf(families.config_from_hf(HYBRID))
    assert said["hybrid_override_pattern"] == "M-MM*--"
    assert said["num_hidden_layers"] == 7
    assert "layers_block_type" not in said
    assert not [name for name in said if "expert" in name or "moe" in name or "mtp" in name]
    limited = replace(families.config_from_hf(HYBRID), time_step_limit=(0.25, 4.0))
    assert families.config_to_hf(limited)["time_step_limit"] == [0.25, 4.0]


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (without(HYBRID, "model_type", model_type="mamba2"), "mamba2"),
        (without(HYBRID, "model_type"), "nemotron_h, nemotron, qwen3, llama"),
        (HYBRID | {"hybrid_override_pattern": "M-ME*--"}, "E at layer 3"),
        (HYBRID | {"hybrid_override_pattern": "M-MX*--"}, "'X' at layer 3"),
        (HYBRID | {"num_hidden_layers": 8}, "num_hidden_layers 8"),
        (HYBRID | {"layers_block_type": ["mamba", "mlp"]}, "differ"),
        (without(HYBRID, "hybrid_override_pattern"), "no hybrid_override_pattern"),
        (without(HYBRID, "hybrid_override_pattern", layers_block_type=["mambo"]), "did you mean 'mamba'"),
        (HYBRID | {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        (HYBRID | {"mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu'"),
        (HYBRID | {"mamba_hidden_act": "gelu"}, "mamba_hidden_act"),
        (HYBRID | {"sliding_window": 128}, "sliding_window 128"),
        (HYBRID | {"time_step_limit": 3.0}, "time_step_limit"),
        (HYBRID | {"mamba_num_heads": 12}, "not divisible by n_groups 8"),
        (without(HYBRID, "hidden_size"), "has no hidden_size"),
        (HYBRID | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (LLAMA | {"rope_interleaved": True}, "rope_interleaved"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (LLAMA | {"num_attention_heads": 0}, "num_attention_heads 0"),
        (LLAMA | {"num_hidden_layers": "3"}, "num_hidden_layers '3'"),
        (QWEN3 | {"mlp_bias": True}, "mlp_bias"),
        (QWEN3 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_window 64"),
        (QWEN3 | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_window"),
        (NEMOTRON | {"hidden_act": "silu"}, "hidden_act"),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(raw, word):
    with pytest.raises(UserError) as error:
        families.config_from_hf(raw, "folder/config.json")
    assert word in str(error.value)


def test_a_sliding_window_that_no_layer_uses_is_no_obstacle():
    for raw in (
        QWEN3 | {"use_sliding_window": False, "sliding_window": 64},
        QWEN3 | {"layer_types": ["full_attention"] * 3},
    ):
        assert families.config_from_hf(raw) == families.config_from_hf(QWEN3)


@pytest.mark.parametrize(
    ("family", "change", "word"),
    [
        ("nemotron_h", {"mlp": "swiglu"}, "mlp"),
        ("nemotron_h", {"rope_theta": 1e4}, "rope_theta"),
        ("nemotron_h", {"attention_bias": True}, "attention_bias"),
        ("llama", {"qk_norm": True}, "qk_norm"),
        ("llama", {"pattern": "*-M"}, "pattern"),
        ("llama", {"rope_theta": None}, "rope_theta"),
        ("qwen3", {"qk_norm": False}, "qk_norm"),
        ("nemotron", {"norm": "rmsnorm"}, "norm"),
    ],
)
def test_a_network_that_its_family_cannot_say_is_refused(family, change, word):
    raw = {"nemotron_h": HYBRID, "llama": LLAMA, "qwen3": QWEN3, "nemotron": NEMOTRON}[family]
    mamba = {name: HYBRID[name] for name in ("mamba_num_heads", "mamba_head_dim", "ssm_state_size")}
    config: ModelConfig = replace(families.config_from_hf(raw), n_groups=8, **mamba, **change)
    with pytest.raises(UserError) as error:
        families.config_to_hf(config)
    assert str(error.value).startswith(f"{word} is")
