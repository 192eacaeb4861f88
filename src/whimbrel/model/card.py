"""The model card: a README.md that says what a folder holds, what it was made from, and under which licences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from whimbrel.model import count
from whimbrel.model.config import ATTENTION, LETTERS, ModelConfig


def card(name: str, config: ModelConfig, stored: Mapping[str, str], lineage: Sequence[str], licence: str | None) -> str:
    """Markdown with the front matter that hubs read. `stored`: rows of the table about the weights, `stored as` first;
    `lineage`: a line for each model and data set it was made from.
    """
    layers = ", ".join(f"{config.count(letter)} {word}" for letter, word in LETTERS.items() if config.count(letter))
    heads = (
        f"{config.num_attention_heads} ({config.num_key_value_heads} for keys and values)"
        if config.count(ATTENTION)
        else "none"
    )
    rows = {
        "family": config.family,
        "layers": layers,
        "pattern": f"`{config.pattern}`",
        "width": f"{config.hidden_size:,}",
        "attention heads": heads,
        "vocabulary": f"{config.vocab_size:,}",
        "context it was made for": f"{config.max_position_embeddings:,} tokens",
        "parameters": f"{count.total(config):,}",
        **stored,
    }
    made_from = [f"* {line}" for line in lineage] or ["* not stated by the program that wrote this folder"]
    front = [
        "---",
        *([f"license: {licence}"] if licence else []),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
    ]
    return "\n".join(
        [
            *front,
            "",
            f"# {name}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {what} | {value} |" for what, value in rows.items()),
            "",
            "## Made from",
            "",
            *made_from,
            "",
            "## Licence",
            "",
            licence or "Not stated. It follows from the licences of what the model was made from, above.",
            "",
        ]
    )
