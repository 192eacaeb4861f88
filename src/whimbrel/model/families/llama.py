"""Llama and its copies (SmolLM2 among them): RMSNorm, gated SiLU feed-forward, full rotary, tied or untied head."""

from __future__ import annotations

from whimbrel.model.families.classic import Classic

FORM = Classic(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fixed={"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": False, "rope_fraction": 1.0},
    activation="silu",
    eps="rms_norm_eps",
    usual={"bos_token_id": 1, "eos_token_id": 2},
)

config_from_hf, config_to_hf, names = FORM.config_from_hf, FORM.config_to_hf, FORM.names
