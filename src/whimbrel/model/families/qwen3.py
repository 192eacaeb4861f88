"""Qwen3, dense: Llama's block with RMSNorm over each head of q and k (arXiv 2505.09388). No sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whimbrel.errors import UserError
from whimbrel.model.config import ModelConfig
from whimbrel.model.families.classic import Classic

FORM = Classic(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed={"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "rope_fraction": 1.0, "mlp_bias": False},
    activation="silu",
    eps="rms_norm_eps",
    usual={"head_dim": 128},
)

config_to_hf, names = FORM.config_to_hf, FORM.names


def config_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The config of a folder. `sliding_window` stands in every file; it is refused only where a layer uses it."""
    config = FORM.config_from_hf(raw, where)
    blocks = config.layers // 2
    kinds = raw.get("layer_types") or ["full_attention"] * min(blocks, raw.get("max_window_layers", 28))
    slides = raw.get("use_sliding_window") and raw.get("sliding_window") and len(kinds) < blocks
    if slides or set(kinds) - {"full_attention"}:
        raise UserError(
            f"{where} uses sliding_window {raw.get('sliding_window')}, which is not computed here; read are full layers"
        )
    return config
