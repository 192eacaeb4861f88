"""The network: embedding, a stack of layers spelled by the pattern, final norm, head. One class for every family.

The forward is flat: T tokens of any number of sequences, cut by a layout, in training, prefill and decoding alike. T
tokens, B batch, L length, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whimbrel import ops
from whimbrel.errors import UserError
from whimbrel.model.attention import Attention
from whimbrel.model.config import ATTENTION, FEED_FORWARD, MAMBA, ModelConfig
from whimbrel.model.decoding import Decoder
from whimbrel.model.layout import Layout
from whimbrel.model.linear import PackedEmbedding, PackedWeight
from whimbrel.model.mamba2 import Mamba2
from whimbrel.model.mlp import MLP
from whimbrel.model.norm import make_norm
from whimbrel.model.state import State
from whimbrel.ops.packed import Packed, unpack

_MIXERS: dict[str, type[Mamba2] | type[Attention] | type[MLP]] = {
    MAMBA: Mamba2,
    ATTENTION: Attention,
    FEED_FORWARD: MLP,
}


class Layer(nn.Module):
    """x + mixer(norm(x)), with exactly one mixer."""

    def __init__(self, config: ModelConfig, index: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.index = index
        self.norm = make_norm(config, device, dtype)
        self.mixer = _MIXERS[config.pattern[index]](config, device, dtype)

    def forward(self, x_TD: Tensor, layout: Layout, state: State | None) -> Tensor:
        """[T, D] -> [T, D], or [R, D] of the rows that the layout asks for."""
        return layout.wanted(x_TD) + self.mixer(self.norm(x_TD), layout, state, self.index)


class Head(nn.Module):
    """The only door to the vocabulary matrix: logits, or any loss over the vocabulary as `fn(hidden_TD, weight_VD)`.

    A tied head owns nothing: it reads the embedding's matrix, which then has one name in the state dict.
    """

    def __init__(self, config: ModelConfig, embeddings: nn.Embedding) -> None:
        super().__init__()
        if config.tie_embeddings:
            self.tie(embeddings)
        else:
            self.weight: nn.Module | nn.Parameter = nn.Parameter(torch.empty_like(embeddings.weight))

    def tie(self, embeddings: nn.Module) -> None:
        """Read the matrix of these embeddings, without registering them as a part of the head."""
        self.__dict__["embeddings"] = embeddings

    def forward(self, hidden_TD: Tensor, fn: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """[T, D] -> logits [T, V] in float32 at least, or what `fn` returns (it is given the unpacked matrix)."""
        weight: Any = self.__dict__["embeddings"].weight if "embeddings" in self.__dict__ else self.weight
        weight_VD = weight.value if isinstance(weight, PackedWeight) else weight
        if fn is not None:
            return fn(hidden_TD, unpack(weight_VD) if isinstance(weight_VD, Packed) else weight_VD)
        return ops.linear(hidden_TD, weight_VD).to(torch.promote_types(hidden_TD.dtype, torch.float32))


class LanguageModel(nn.Module):
    """A language model of any family. Weights are unset until `initialise` or `load`."""

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = config
        self.weights_version = 0
        self.share: Any = None
        """How it is spread over processes, if it is (`parallel/apply.py`)."""
        self.embeddings: nn.Embedding | PackedEmbedding = nn.Embedding(
            config.vocab_size, config.hidden_size, device=device, dtype=dtype
        )
        self.layers = nn.ModuleList(Layer(config, index, device, dtype) for index in range(config.layers))
        self.norm_f = make_norm(config, device, dtype)
        self.head = Head(config, self.embeddings)
        self.decoder = Decoder()

    def forward(self, tokens: Tensor, layout: Layout | None = None, state: State | None = None) -> Tensor:
        """tokens_T and a layout -> hidden_TD after the final norm, of `layout.rows` if given. tokens_BL alone ->
        logits_BLV.

        With a state, the sequences continue from it and it is advanced in place (no gradient flows through a state).
        """
        if layout is None:
            batch, length = tokens.shape
            if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
                raise UserError(
                    f"tokens run from {int(tokens.min())} to {int(tokens.max())}; set each from 0 to "
                    f"{self.config.vocab_size - 1}, as this model's vocab_size is {self.config.vocab_size}"
                )
            flat = Layout.of([length] * batch, device=tokens.device)
            return self.head(self(tokens.flatten(), flat)).unflatten(0, (batch, length))
        if state is not None and layout.decodes:
            hidden_TD = self.decoder(self, tokens, layout, state)
            if hidden_TD is not None:
                if not layout.only_decodes:
                    hidden_TD = torch.cat([hidden_TD, self(tokens[layout.decodes :], layout.rest(), state)])
                return layout.wanted(hidden_TD)
        x_TD, whole, layers = self.embeddings(tokens), replace(layout, rows=None), list(self.layers)
        mixing = len(self.config.pattern.rstrip(FEED_FORWARD))  # in the layers behind these no token sees another
        with nullcontext() if state is None else ops.reading_prompts():
            for place, layer in enumerate(layers[:mixing], 1):
                x_TD = layer(x_TD, layout if place == mixing else whole, state)
            x_TD = x_TD if mixing else layout.wanted(x_TD)
            for layer in layers[mixing:] if len(x_TD) else ():
                x_TD = layer(x_TD, whole, state)
        return self.norm_f(x_TD)

    def touch(self) -> None:
        """Say that weights changed: everything cached from them is void."""
        self.weights_version += 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights (Mamba's A_log, D and dt_bias are float32 besides); of the arithmetic if packed."""
        return self.embeddings.weight.dtype

    @property
    def kv_dtype(self) -> torch.dtype:
        """The dtype that keys and values are kept in: the weights', but float16 beside packed weights in float32."""
        half = isinstance(self.embeddings, PackedEmbedding) and self.dtype == torch.float32
        return torch.float16 if half else self.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embeddings.weight.device

    @torch.no_grad()
    def initialise(self, seed: int) -> LanguageModel:
        """Random weights: N(0, initializer_range), the last projection of each layer divided by sqrt(layers); Mamba as
        in arXiv 2405.21060.

        A ~ U(1, 16); step sizes log-uniform in [time_step_min, time_step_max], at least time_step_floor; D = 1.
        """
        generator = torch.Generator(device=self.device).manual_seed(seed)
        config = self.config
        scale = 1 / math.sqrt(config.layers) if config.rescale_prenorm_residual else 1.0
        for name, parameter in self.named_parameters():
            leaf = (
                name.rpartition(".")[0].rpartition(".")[2]
                if name.endswith((".weight", ".bias"))
                else name.rpartition(".")[2]
            )
            if leaf in ("norm", "norm_f", "norm_weight", "q_norm_weight", "k_norm_weight"):
                one = config.norm == "rmsnorm" or leaf.endswith("_weight")
                parameter.fill_(1.0 if one and not name.endswith("bias") else 0.0)
            elif name.endswith("bias") and leaf not in ("conv_bias", "dt_bias"):
                parameter.zero_()
            elif parameter.dim() == 2 and leaf != "conv_weight":
                parameter.normal_(0.0, config.initializer_range, generator=generator)
                if leaf in ("out_proj", "o_proj", "down_proj"):
                    parameter.mul_(scale)
            else:
                _initialise_mamba(leaf, parameter, config, generator)
        self.touch()
        return self

    @classmethod
    def load(
        cls, source: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
    ) -> LanguageModel:
        """Read a Hugging Face folder, a .gguf file, a fetched model's name or a hub id. See `model/checkpoint.py`."""
        from whimbrel.model import checkpoint

        return checkpoint.load(source, dtype=dtype, device=device)

    def save(self, folder: str | Path, tokenizer_folder: str | Path | None = None) -> None:
        """Write a Hugging Face folder of the model's family, whole or not at all."""
        from whimbrel.model import checkpoint

        checkpoint.save(self, folder, tokenizer_folder)


def _initialise_mamba(leaf: str, parameter: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    """The parameters that only Mamba-2 has."""
    if leaf == "A_log":
        parameter.uniform_(1, 16, generator=generator).log_()
    elif leaf == "D":
        parameter.fill_(1.0)
    elif leaf == "dt_bias":
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = parameter.uniform_(low, high, generator=generator).exp().clamp(min=config.time_step_floor)
        parameter.copy_(dt + torch.log(-torch.expm1(-dt)))
    elif leaf in ("conv_weight", "conv_bias"):
        bound = 1 / math.sqrt(config.conv_kernel)
        parameter.uniform_(-bound, bound, generator=generator)
    else:
        raise AssertionError(f"no rule initialises {leaf}")
