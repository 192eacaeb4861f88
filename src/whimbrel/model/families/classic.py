"""What Llama, Qwen3 and Nemotron-4 folders share: blocks of attention and feed-forward, under Llama's names.

Block i is our layers 2i (attention, `input_layernorm`) and 2i + 1 (feed-forward, `post_attention_layernorm`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from whimbrel.errors import UserError
from whimbrel.model.config import ModelConfig
from whimbrel.model.families.fields import Fields, expressible, ids_to_hf, rotary_to_hf


@dataclass(frozen=True)
class Classic:
    """One family of classic transformers: how its `config.json` spells what differs between them."""

    model_type: str
    architecture: str
    fixed: Mapping[str, Any]
    """Fields of `ModelConfig` that are the same in every member."""
    activation: str
    eps: str
    """How the file spells `norm_eps`."""
    usual: Mapping[str, Any] = field(default_factory=dict)
    """What an absent token id (or Qwen3's head_dim) means in this family."""
    usual_fraction: float = 1.0

    def config_from_hf(self, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """The config of a folder; `UserError` names every value that this package would compute differently."""
        fields = Fields(raw, where)
        fields.only("hidden_act", self.activation)
        fields.only("rope_interleaved", False)
        heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
        fixed = dict(self.fixed)
        if "mlp_bias" in fixed:
            fields.only("mlp_bias", fixed["mlp_bias"])
        else:
            fixed["mlp_bias"] = fields.get("mlp_bias", default=False)
        rotary = fields.rotary(self.usual_fraction)
        if rotary["rope_fraction"] != fixed.setdefault("rope_fraction", rotary["rope_fraction"]):
            raise UserError(f"{where} says partial_rotary_factor {rotary['rope_fraction']}, which is not computed here")
        return ModelConfig(
            family=self.model_type,
            pattern="*-" * fields.size("num_hidden_layers"),
            vocab_size=fields.get("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.get("intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=fields.get("num_key_value_heads", default=heads),
            head_dim=fields.get("head_dim", "attention_head_dim", default=self.usual.get("head_dim", hidden // heads)),
            attention_bias=fields.get("attention_bias", default=False),
            norm_eps=fields.get(self.eps),
            tie_embeddings=fields.get("tie_word_embeddings", default=False),
            max_position_embeddings=fields.get("max_position_embeddings"),
            initializer_range=fields.get("initializer_range", default=0.02),
            rescale_prenorm_residual=fields.get("rescale_prenorm_residual", default=False),  # initialisation only
            bos_token_id=fields.ids("bos_token_id", self.usual.get("bos_token_id")),
            eos_token_id=fields.ids("eos_token_id", self.usual.get("eos_token_id")),
            pad_token_id=fields.ids("pad_token_id", None),
            **{**rotary, **fixed},
        )

    def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """`config.json` of a network of this family; `UserError` if the family cannot say it."""
        expressible(config, self.fixed)
        if config.pattern != "*-" * (config.layers // 2):
            raise UserError(
                f"pattern is {config.pattern!r}, which a {self.model_type} folder cannot say; "
                "set pattern to *- repeated, or family to nemotron_h"
            )
        if config.rope_theta is None:
            raise UserError(
                f"rope_theta is null, but a {self.model_type} folder has rotary positions; set rope_theta to 10000.0"
            )
        said = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.layers // 2,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "hidden_act": self.activation,
            "attention_bias": config.attention_bias,
            self.eps: config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "max_position_embeddings": config.max_position_embeddings,
            "initializer_range": config.initializer_range,
            **rotary_to_hf(config),
            **ids_to_hf(config),
        }
        if config.rescale_prenorm_residual:
            said["rescale_prenorm_residual"] = True
        if "mlp_bias" not in self.fixed:
            said["mlp_bias"] = config.mlp_bias
        if "rope_fraction" not in self.fixed:
            said["partial_rotary_factor"] = config.rope_fraction
        return said

    def names(self, config: ModelConfig) -> dict[str, str]:
        """Our name -> the name in the file, for every tensor of the network."""
        norm = ("weight", "bias") if config.norm == "layernorm1p" else ("weight",)
        table = {"embeddings.weight": "model.embed_tokens.weight"}
        table |= {f"norm_f.{part}": f"model.norm.{part}" for part in norm}
        if not config.tie_embeddings:
            table["head.weight"] = "lm_head.weight"
        for layer, letter in enumerate(config.pattern):
            ours, block = f"layers.{layer}", f"model.layers.{layer // 2}"
            before, mixer = ("input_layernorm", "self_attn") if letter == "*" else ("post_attention_layernorm", "mlp")
            table |= {f"{ours}.norm.{part}": f"{block}.{before}.{part}" for part in norm}
            table |= {
                f"{ours}.mixer.{our}": f"{block}.{mixer}.{their}" for our, their in mixer_names(config, letter).items()
            }
        return table


def mixer_names(config: ModelConfig, letter: str) -> dict[str, str]:
    """Attention or feed-forward: our name inside the mixer -> the name in every family's file."""
    if letter == "*":
        projections, bias = ["q_proj", "k_proj", "v_proj", "o_proj"], config.attention_bias
    else:
        gate = ["gate_proj"] if config.mlp == "swiglu" else []
        projections, bias = [*gate, "up_proj", "down_proj"], config.mlp_bias
    parts = ("weight", "bias") if bias else ("weight",)
    table = {f"{projection}.{part}": f"{projection}.{part}" for projection in projections for part in parts}
    if letter == "*" and config.qk_norm:
        table |= {"q_norm_weight": "q_norm.weight", "k_norm_weight": "k_norm.weight"}
    return table
