"""Tensor parallel: every matrix is cut into plain local tensors, and the mixers run unchanged on a smaller config.

Megatron's cut (arXiv 1909.08053): the first projection of a mixer by outputs, the last by inputs; one sum over ranks a
layer, forward and back. Mamba-2's input projection holds z, x, B, C and dt, each of which is cut by itself, so that
heads, their groups of B and C and the groups of the gated norm stay together. Embedding and head are cut by rows of the
vocabulary. H heads, P head width, G groups, N state size, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from whimbrel import ops
from whimbrel.model.config import ATTENTION, FEED_FORWARD, MAMBA, ModelConfig
from whimbrel.model.language import LanguageModel
from whimbrel.ops.split import SplitVocabulary
from whimbrel.parallel import collectives
from whimbrel.parallel.mesh import Share

PARTIAL = ("q_norm_weight", "k_norm_weight")
"""Whole on every rank, but each rank sees its own heads: their gradients are summed over the axis `tensor`."""


@dataclass(frozen=True)
class Cut:
    """Which dim of a parameter is cut, and the segments along it, each of which is cut by itself: (label, size)."""

    dim: int
    segments: tuple[tuple[str, int], ...]

    def piece(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """The part of one rank: its share of every segment."""
        parts = whole.split([size for _, size in self.segments], self.dim)
        return torch.cat([part.chunk(ranks, self.dim)[rank] for part in parts], self.dim)

    def whole(self, pieces: Sequence[Tensor]) -> Tensor:
        """What all ranks' pieces are together."""
        cut = [piece.split([size // len(pieces) for _, size in self.segments], self.dim) for piece in pieces]
        return torch.cat([part for segment in zip(*cut, strict=True) for part in segment], self.dim)


def cuts(config: ModelConfig) -> dict[str, Cut]:
    """How each parameter is cut, by its name; those that are not here are whole on every rank."""
    table = {"embeddings.weight": Cut(0, (("", config.vocab_size),))}
    if not config.tie_embeddings:
        table["head.weight"] = Cut(0, (("", config.vocab_size),))
    mixers = {MAMBA: _mamba, ATTENTION: _attention, FEED_FORWARD: _mlp}
    for layer, letter in enumerate(config.pattern):
        table |= {f"layers.{layer}.mixer.{name}": cut for name, cut in mixers[letter](config).items()}
    return table


def _mamba(config: ModelConfig) -> dict[str, Cut]:
    heads, inner, shared = config.mamba_num_heads, config.mamba_inner, config.n_groups * config.ssm_state_size
    convolved = (("x", inner), ("B", shared), ("C", shared))
    projected = Cut(0, (("z", inner), *convolved, ("dt", heads)))
    return {
        "in_proj.weight": projected,
        "in_proj.bias": projected,
        "conv_weight": Cut(0, convolved),
        "conv_bias": Cut(0, convolved),
        **{name: Cut(0, (("", heads),)) for name in ("A_log", "D", "dt_bias")},
        "norm_weight": Cut(0, (("", inner),)),
        "out_proj.weight": Cut(1, (("", inner),)),
    }


def _attention(config: ModelConfig) -> dict[str, Cut]:
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    table = {f"{name}.{part}": Cut(0, (("", size),)) for name, size in sizes.items() for part in ("weight", "bias")}
    return table | {"o_proj.weight": Cut(1, (("", queries),))}


def _mlp(config: ModelConfig) -> dict[str, Cut]:
    whole = (("", config.intermediate_size),)
    table = {f"{name}.{part}": Cut(0, whole) for name in ("up_proj", "gate_proj") for part in ("weight", "bias")}
    return table | {"down_proj.weight": Cut(1, whole)}


def local_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """What the mixers of one rank are made of: the vocabulary and the width stay, the rest is divided."""
    names = ["mamba_num_heads", "num_attention_heads", "num_key_value_heads", "intermediate_size"]
    names += ["n_groups"] * (MAMBA in config.pattern)
    return replace(config, **{name: getattr(config, name) // ranks for name in names})


def cut(model: LanguageModel, share: Share) -> None:
    """Cut a model in place. `model.config` still describes the whole."""
    ranks, rank, group = share.axes.tensor, share.place["tensor"], share.group("tensor")
    table = cuts(model.config)
    for name, parameter in list(model.named_parameters()):
        if name in table:
            owner, _, leaf = name.rpartition(".")
            piece = table[name].piece(parameter.detach(), rank, ranks).clone()
            setattr(model.get_submodule(owner), leaf, nn.Parameter(piece, requires_grad=parameter.requires_grad))
    smaller = local_config(model.config, ranks)
    for layer in model.layers:
        mixer: Any = layer.mixer
        mixer.config = smaller
        mixer.forward = partial(_spread, mixer.forward, group)
        last = next(getattr(mixer, name) for name in ("out_proj", "o_proj", "down_proj") if hasattr(mixer, name))
        last.forward = partial(_gathered, last, last.forward, group)
    rows = model.config.vocab_size // ranks
    assert isinstance(model.embeddings, nn.Embedding)
    model.embeddings.forward = partial(_look_up, model.embeddings, rank * rows, group)  # type: ignore[method-assign]
    talk = _Talk(group)
    model.head.forward = partial(_head, model.head.forward, rank * rows, talk)  # type: ignore[method-assign]


def _spread(mixer: Callable[..., Tensor], group: distributed.ProcessGroup, x_TD: Tensor, *rest: Any) -> Tensor:
    return mixer(collectives.copy(x_TD, group), *rest)


def _gathered(
    last: nn.Linear, product: Callable[[Tensor], Tensor], group: distributed.ProcessGroup, x: Tensor
) -> Tensor:
    """The projection back to the stream, in whatever form it had (FP8): a part of the sum; the bias comes once, after
    it.
    """
    bias, last._parameters["bias"] = last.bias, None
    try:
        y_TD = collectives.add(product(x), group)
    finally:
        last._parameters["bias"] = bias
    return y_TD if bias is None else y_TD + bias


def _look_up(embeddings: nn.Embedding, first: int, group: distributed.ProcessGroup, tokens_T: Tensor) -> Tensor:
    """Rows that lie here; zeros for the others, which come with the sum."""
    rows = embeddings.weight.shape[0]
    outside = (tokens_T < first) | (tokens_T >= first + rows)
    x_TD = F.embedding((tokens_T - first).clamp(0, rows - 1), embeddings.weight)
    return collectives.add(x_TD.masked_fill(outside[..., None], 0), group)


@dataclass(frozen=True)
class _Talk:
    """`ops.split.Ranks` over a process group."""

    group: distributed.ProcessGroup

    def add(self, x: Tensor) -> Tensor:
        distributed.all_reduce(x, group=self.group)
        return x

    def largest(self, x: Tensor) -> Tensor:
        distributed.all_reduce(x, distributed.ReduceOp.MAX, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, -1)


def _head(
    head: Callable[..., Tensor],
    first: int,
    talk: _Talk,
    hidden_TD: Tensor,
    fn: Callable[[Tensor, Any], Tensor] | None = None,
) -> Tensor:
    """`Head.forward`, whose matrix is the part of the vocabulary that lies here."""

    def logits(hidden_TD: Tensor, split: SplitVocabulary) -> Tensor:
        return ops.linear(hidden_TD, split).to(torch.promote_types(hidden_TD.dtype, torch.float32))

    return head(hidden_TD, lambda hidden, weight: (fn or logits)(hidden, SplitVocabulary(weight, first, talk)))
