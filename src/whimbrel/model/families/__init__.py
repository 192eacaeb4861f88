"""The Hugging Face folder forms that are read and written: one file a family, each with the same three functions.

`config_from_hf(dict) -> ModelConfig`, `config_to_hf(ModelConfig) -> dict`, `names(config) -> {our name: name on disk}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from whimbrel.errors import UserError
from whimbrel.model.config import ModelConfig
from whimbrel.model.families import llama, nemotron, nemotron_h, qwen3

FORMS = {"nemotron_h": nemotron_h, "nemotron": nemotron, "qwen3": qwen3, "llama": llama}


def config_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The config in a parsed `config.json` of any family read here; `where` is how errors call the file."""
    kind = raw.get("model_type")
    if kind not in FORMS:
        raise UserError(f"{where} says model_type {kind!r}; the families read here are {', '.join(FORMS)}")
    return FORMS[kind].config_from_hf(raw, where)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """`config.json` in the form of the config's family; `UserError` if that family cannot say this network."""
    return FORMS[config.family].config_to_hf(config)


def names(config: ModelConfig) -> dict[str, str]:
    """Our name -> the name on disk, for every tensor of the network. Tied heads have no tensor of their own."""
    return FORMS[config.family].names(config)


def copies(config: ModelConfig) -> dict[str, str]:
    """Name on disk -> our name of what it repeats. transformers' NemotronH never ties, so a tied head is copied."""
    tied = config.tie_embeddings and config.family == "nemotron_h"
    return {"lm_head.weight": "embeddings.weight"} if tied else {}


def plain(name: str) -> str:
    """A name on disk without what differs between writers: the prefix, and the spelling of the embedding."""
    name = re.sub(r"^(model|backbone)\.", "", name)
    return re.sub(r"^(embedding|embed_tokens)\.", "embeddings.", name)


def disk_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a tensor on disk: ours, except that a depthwise convolution [I, W] is kept there as [I, 1, W]."""
    return (shape[0], 1, *shape[1:]) if name.endswith("conv1d.weight") else tuple(shape)
