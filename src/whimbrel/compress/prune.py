"""Surgery: the units that are kept, cut out of every tensor they run through.

The kept units are numbers in the order they shall have, so that the same function permutes: a network whose units
change places computes the same. Mamba heads keep their group and every group as many (B and C belong to the group), the
channels of a head are the same in all heads, and query heads stay with their key/value head (arXiv 2504.11409, section
3.1).

D model width, F feed-forward width, H heads, P Mamba head width, G groups, N state size, K key/value heads, E attention
head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from whimbrel.compress.importance import Importance
from whimbrel.model import count
from whimbrel.model.config import ATTENTION, MAMBA, ModelConfig
from whimbrel.model.language import LanguageModel


@dataclass(frozen=True)
class Units:
    """What is kept of a network, as numbers of its own units."""

    layers: tuple[int, ...]
    channels_D: Tensor
    inside: Mapping[int, tuple[Tensor, ...]]
    """By layer of the parent. `-`: (neurons). `M`: (heads, group after group; channels of a head). `*`: (key/value
    heads; query heads, in the order of theirs)."""


def select(importance: Importance, parent: ModelConfig, child: ModelConfig, layers: Sequence[int]) -> Units:
    """The best units for the shape of a child that keeps these layers."""
    inside = {layer: _best(importance.units[layer], parent.pattern[layer], parent, child) for layer in layers}
    return Units(tuple(layers), top(importance.channels_D, child.hidden_size), inside)


def top(scores: Tensor, keep: int) -> Tensor:
    """Numbers of the `keep` largest along the last dim, ascending."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :keep].sort(dim=-1).values


def _best(scores: Tensor, letter: str, parent: ModelConfig, child: ModelConfig) -> tuple[Tensor, ...]:
    if letter == MAMBA:
        channels = top(scores.norm(dim=0), child.mamba_head_dim)
        heads_GH = scores[:, channels].norm(dim=1).unflatten(0, (parent.n_groups, -1))
        kept_GH = top(heads_GH, child.mamba_num_heads // child.n_groups)
        return (kept_GH + torch.arange(parent.n_groups)[:, None] * heads_GH.shape[1]).flatten(), channels
    if letter == ATTENTION:
        heads_KH = scores.unflatten(0, (parent.num_key_value_heads, -1))
        keys = top(heads_KH.norm(dim=1), child.num_key_value_heads)
        kept_KH = top(heads_KH[keys], child.num_attention_heads // child.num_key_value_heads)
        return keys, (kept_KH + keys[:, None] * heads_KH.shape[1]).flatten()
    return (top(scores, child.intermediate_size),)


@torch.no_grad()
def cut(parent: LanguageModel, units: Units, planned: ModelConfig) -> LanguageModel:
    """The network of the kept units, every name and shape as planned; the parent is left as it is."""
    whole = torch.arange(parent.config.vocab_size)
    kept = {}
    for name, tensor in parent.named_parameters():
        if not name.startswith("layers."):
            kept[name] = _take(tensor, (units.channels_D,) if tensor.dim() == 1 else (whole, units.channels_D))
    for new, old in enumerate(units.layers):
        places = _places(parent.config, parent.config.pattern[old], units.channels_D, units.inside[old])
        for leaf, tensor in parent.layers[old].named_parameters():
            part = leaf.removeprefix("mixer.").removesuffix(".weight").removesuffix(".bias")
            kept[f"layers.{new}.{leaf}"] = _take(tensor, places[part])
    child = LanguageModel(planned, device=parent.device, dtype=parent.dtype)
    child.load_state_dict(kept)  # strict: all names and shapes
    child.touch()
    assert sum(p.numel() for p in child.parameters()) == count.total(planned)
    return child


def _take(tensor: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """Rows, columns: as many as the tensor has dims; dims without places stay whole."""
    for dim, numbers in enumerate(places[: tensor.dim()]):
        tensor = tensor.index_select(dim, numbers.to(tensor.device))
    return tensor


def _places(
    config: ModelConfig, letter: str, channels_D: Tensor, inside: tuple[Tensor, ...]
) -> dict[str, tuple[Tensor, ...]]:
    """Which rows and columns stay of every tensor of a layer; a bias has the rows of its matrix."""
    if letter == MAMBA:
        return {"norm": (channels_D,)} | _mamba(config, channels_D, *inside)
    if letter == ATTENTION:
        keys, queries = (_spread(heads, torch.arange(config.head_dim), config.head_dim) for heads in inside)
        norms = {"q_norm_weight": (), "k_norm_weight": ()}
        into = {"q_proj": (queries, channels_D), "k_proj": (keys, channels_D), "v_proj": (keys, channels_D)}
        return {"norm": (channels_D,), "o_proj": (channels_D, queries)} | into | norms
    (neurons,) = inside
    into = {"up_proj": (neurons, channels_D), "gate_proj": (neurons, channels_D)}
    return {"norm": (channels_D,), "down_proj": (channels_D, neurons)} | into


def _mamba(config: ModelConfig, channels_D: Tensor, heads: Tensor, channels: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """in_proj is z, x, B, C, dt; the convolution runs over x, B, C."""
    inner = _spread(heads, channels, config.mamba_head_dim)
    x, shared = config.mamba_inner, torch.arange(2 * config.n_groups * config.ssm_state_size)
    rows = torch.cat([inner, x + inner, 2 * x + shared, x + config.conv_channels + heads])
    convolution = (torch.cat([inner, x + shared]),)
    return {
        "in_proj": (rows, channels_D),
        "conv_weight": convolution,
        "conv_bias": convolution,
        "A_log": (heads,),
        "D": (heads,),
        "dt_bias": (heads,),
        "norm_weight": (inner,),
        "out_proj": (channels_D, inner),
    }


def _spread(heads: Tensor, channels: Tensor, width: int) -> Tensor:
    """Numbers of the channels of these heads, each `width` wide."""
    return (heads[:, None] * width + channels).flatten()


def prove(child: LanguageModel, folder: Path) -> None:
    """Built = saved = loaded: counts, names, shapes, every bit."""
    again = LanguageModel.load(folder, dtype=child.dtype)
    assert count.parameters(again.config) == count.parameters(child.config)
    built, loaded = dict(child.named_parameters()), dict(again.named_parameters())
    assert built.keys() == loaded.keys()
    assert all(torch.equal(tensor.cpu(), loaded[name]) for name, tensor in built.items()), (
        "loaded is not what was built"
    )
