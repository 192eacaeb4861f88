"""Nemotron-4 and Minitron: LayerNorm stored minus one, squared ReLU without a gate, rotary on half of each head.

arXiv 2402.16819 (15B) and 2406.11704 (340B).
"""

from __future__ import annotations

from whimbrel.model.families.classic import Classic

FORM = Classic(
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    fixed={"norm": "layernorm1p", "mlp": "relu2", "qk_norm": False},
    activation="relu2",
    eps="norm_eps",
    usual={"bos_token_id": 2, "eos_token_id": 3},
    usual_fraction=0.5,
)

config_from_hf, config_to_hf, names = FORM.config_from_hf, FORM.config_to_hf, FORM.names
