"""GGUF files of Llama, Qwen3 and Nemotron-H: config, weights and names. Needs the package `gguf` (extra `gguf`).

Weights are dequantised to float32 one tensor at a time: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, the K-quants.
Not read: other architectures, experts, sliding windows, widths that differ between the layers of one kind, rotary
scaling that is not Llama-3.1's. `gguf_write.py` is the other direction; `to_file` and `names` serve both.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whimbrel.errors import UserError, need
from whimbrel.model.config import ATTENTION, FEED_FORWARD, MAMBA, ModelConfig, RopeScaling
from whimbrel.model.families.classic import mixer_names
from whimbrel.model.positions import frequencies

ARCHITECTURES = ("llama", "qwen3", "nemotron_h")
ROTATED = re.compile(r"attn_(q|k)\.(weight|bias)$")
ROPE_FACTORS = "rope_freqs.weight"
IN_ROWS = re.compile(r"ssm_(a|d|norm\.weight)$")
"""Tensors with one number a head or channel, which the file lays out in rows that llama.cpp broadcasts."""


class GGUF:
    """One file: its `config`, the shapes of its tensors by their names in the file, and `read` for one of them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        package = need("gguf", extra="gguf")
        try:
            self._reader = package.GGUFReader(self.path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            size = self.path.stat().st_size if self.path.exists() else 0
            raise UserError(
                f"{self.path} is cut off or is no GGUF file ({size:,} bytes: {error}); copy the file again"
            ) from error
        self._dequantize = package.dequantize
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.shapes = {name: _shape(name, tensor.shape) for name, tensor in self._tensors.items()}
        self.architecture: str = self.field("general.architecture")
        self.config = self._config()
        self.shapes.pop(ROPE_FACTORS, None)  # it has become config.rope_scaling

    def field(self, name: str, default: Any = None) -> Any:
        """A value of the metadata."""
        field = self._reader.fields.get(name)
        return default if field is None else field.contents()

    def read(self, name: str) -> Tensor:
        """One tensor as float32, as Hugging Face keeps it (and we): the order of q and k, A as its logarithm."""
        entry = self._tensors[name]
        try:
            values = self._dequantize(entry.data, entry.tensor_type).reshape(self.shapes[name])
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: tensor {name} is stored as {entry.tensor_type.name}, which is not read here"
            ) from error
        tensor = torch.from_numpy(np.array(values, dtype=np.float32))
        if name.endswith("ssm_a"):
            return tensor.neg_().log_()
        match = ROTATED.search(name) if self.architecture == "llama" else None
        if not match:
            return tensor
        heads = self.config.num_attention_heads if match[1] == "q" else self.config.num_key_value_heads
        return halves(tensor, heads)

    def _size(self, name: str, default: int | None = None) -> int:
        value = self.field(f"{self.architecture}.{name}", default)
        if not isinstance(value, int):
            found = "missing" if value is None else f"{value!r}, which differs between layers"
            raise UserError(
                f"{self.path}: {self.architecture}.{name} is {found}; read are files where it is one whole number"
            )
        return value

    def _config(self) -> ModelConfig:
        kind = self.architecture
        if kind not in ARCHITECTURES:
            raise UserError(f"{self.path} has the architecture {kind!r}; read are {', '.join(ARCHITECTURES)}")
        for name in (f"{kind}.expert_count", f"{kind}.attention.sliding_window"):
            if self.field(name, 0):
                raise UserError(f"{self.path} says {name} {self.field(name)}, which is not computed here")
        if "token_embd.weight" not in self.shapes:
            raise UserError(f"{self.path} lacks tensor token_embd.weight; copy the file again")
        return ModelConfig(
            family=kind,
            vocab_size=self.shapes["token_embd.weight"][0],
            hidden_size=self._size("embedding_length"),
            norm_eps=float(
                f"{self.field(f'{kind}.attention.layer_norm_rms_epsilon'):.7g}"
            ),  # stored as float32: 1e-5, not 9.99e-6
            tie_embeddings="output.weight" not in self.shapes,
            max_position_embeddings=self._size("context_length"),
            rescale_prenorm_residual=kind == "nemotron_h",
            **(self._hybrid() if kind == "nemotron_h" else self._classic()),
            **self._ids(),
        )

    def _ids(self) -> dict[str, Any]:
        """The special tokens; every id that ends a turn ends a text."""
        bos, eos, pad, *turns = (
            self.field(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding", "eot", "eom")
        )
        ends = sorted({i for i in (eos, *turns) if i is not None})
        return {"bos_token_id": bos, "eos_token_id": tuple(ends) if len(ends) > 1 else eos, "pad_token_id": pad}

    def _classic(self) -> dict[str, Any]:
        """What the config of a classic transformer has of its own."""
        heads = self._size("attention.head_count")
        head_dim = self._size("attention.key_length", self._size("embedding_length") // heads)
        if (turning := self._size("rope.dimension_count", head_dim)) != head_dim:
            raise UserError(
                f"{self.path} rotates {turning} of {head_dim} channels of a head; read are files that rotate all"
            )
        theta = float(self.field(f"{self.architecture}.rope.freq_base", 10_000.0))
        return {
            "pattern": "*-" * self._size("block_count"),
            "intermediate_size": self._size("feed_forward_length"),
            "mlp": "swiglu",
            "mlp_bias": "blk.0.ffn_up.bias" in self.shapes,
            "num_attention_heads": heads,
            "num_key_value_heads": self._size("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "attention_bias": "blk.0.attn_q.bias" in self.shapes,
            "qk_norm": self.architecture == "qwen3",
            "rope_theta": theta,
            "rope_scaling": self._scaling(theta, head_dim),
        }

    def _hybrid(self) -> dict[str, Any]:
        """What the config of a hybrid has of its own; the kind of a layer shows in its widths."""
        kv_heads, wide = (self._layers(name) for name in ("attention.head_count_kv", "feed_forward_length"))
        pattern = "".join(FEED_FORWARD if f else ATTENTION if k else MAMBA for k, f in zip(kv_heads, wide, strict=True))
        sizes: dict[str, Any] = {"pattern": pattern}
        if FEED_FORWARD in pattern:
            sizes |= {"intermediate_size": max(wide), "mlp_bias": any(n.endswith("ffn_up.bias") for n in self.shapes)}
        if ATTENTION in pattern:
            heads = self._size("attention.head_count")
            sizes |= {"num_attention_heads": heads, "num_key_value_heads": max(kv_heads)}
            sizes["head_dim"] = self._size("attention.key_length", self._size("embedding_length") // heads)
        if MAMBA in pattern:
            names = {"mamba_num_heads": "time_step_rank", "ssm_state_size": "state_size", "n_groups": "group_count"}
            sizes |= {ours: self._size(f"ssm.{theirs}") for ours, theirs in names.items()}
            sizes["mamba_head_dim"] = self._size("ssm.inner_size") // sizes["mamba_num_heads"]
            sizes["conv_kernel"] = self._size("ssm.conv_kernel")
            sizes["conv_bias"] = any(name.endswith("ssm_conv1d.bias") for name in self.shapes)
        return sizes

    def _layers(self, name: str) -> list[int]:
        """One number for each layer; those of one kind are the same, or the file is refused."""
        values = self.field(f"nemotron_h.{name}")
        if not isinstance(values, list) or len(values) != self._size("block_count") or len({0, *values}) > 2:
            raise UserError(f"{self.path}: nemotron_h.{name} is {values!r}; read are lists of 0 and one other number")
        return values

    def _scaling(self, theta: float, head_dim: int) -> RopeScaling | None:
        """Llama-3.1's scaling, which GGUF keeps as one divisor for each frequency; `UserError` for any other."""
        kind = self.field(f"{self.architecture}.rope.scaling.type", "none")
        if kind not in ("none", "llama3"):
            raise UserError(
                f"{self.path} says rope.scaling.type {kind!r}, which is not computed here; read is Llama-3.1's"
            )
        if ROPE_FACTORS not in self._tensors:
            return None
        entry = self._tensors[ROPE_FACTORS]
        factors_R = torch.from_numpy(np.array(self._dequantize(entry.data, entry.tensor_type), dtype=np.float64))
        scaling = RopeScaling(
            float(factors_R.max()), 1.0, 4.0, 8192
        )  # what every published Llama-3.x uses beside its factor
        plain = ModelConfig(
            "*", 1, 1, num_attention_heads=1, num_key_value_heads=1, head_dim=head_dim, rope_theta=theta
        )
        scaled = ModelConfig(**{**vars(plain), "rope_scaling": scaling})
        cpu = torch.device("cpu")
        if not torch.allclose(frequencies(plain, cpu) / frequencies(scaled, cpu), factors_R, rtol=1e-4):
            raise UserError(
                f"{self.path}: tensor {ROPE_FACTORS} is not Llama-3.1's scaling; load the model from its folder"
            )
        return scaling


def _shape(name: str, reversed_shape: Any) -> tuple[int, ...]:
    """The shape of a tensor as Hugging Face keeps it."""
    shape = tuple(int(n) for n in reversed(reversed_shape))
    if IN_ROWS.search(name):
        return (math.prod(shape),)
    return (shape[0], 1, shape[1]) if name.endswith("ssm_conv1d.weight") else shape


def halves(tensor: Tensor, heads: int) -> Tensor:
    """[heads * E, ...]: each head's rows from GGUF's order, where channels that turn together adjoin, to halves."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def neighbours(tensor: Tensor, heads: int) -> Tensor:
    """The other direction of `halves`."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def to_file(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """A float32 tensor as llama.cpp wants it under this name of the file: what `GGUF.read` undoes."""
    if name.endswith("ssm_a"):
        return -tensor.exp()[:, None]
    if name.endswith("ssm_d"):
        return tensor[:, None]
    if name.endswith("ssm_conv1d.weight"):
        return tensor.flatten(1)
    if name.endswith("ssm_norm.weight"):
        return tensor.unflatten(0, (config.n_groups, -1))
    match = ROTATED.search(name) if config.family == "llama" else None
    if not match:
        return tensor
    return neighbours(tensor, config.num_attention_heads if match[1] == "q" else config.num_key_value_heads)


_MAMBA = {
    "in_proj.weight": "ssm_in.weight",
    "conv_weight": "ssm_conv1d.weight",
    "conv_bias": "ssm_conv1d.bias",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "dt_bias": "ssm_dt.bias",
    "norm_weight": "ssm_norm.weight",
    "out_proj.weight": "ssm_out.weight",
}
_PARTS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_PARTS |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
_PARTS |= {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}


def names(config: ModelConfig) -> dict[str, str]:
    """Our name -> the name in a GGUF file, whose blocks are single layers in a hybrid and pairs of them elsewhere."""
    table = {"embeddings.weight": "token_embd.weight", "norm_f.weight": "output_norm.weight"}
    if not config.tie_embeddings:
        table["head.weight"] = "output.weight"
    hybrid = config.family == "nemotron_h"
    for layer, letter in enumerate(config.pattern):
        ours, block = f"layers.{layer}", f"blk.{layer if hybrid else layer // 2}"
        norm = "attn_norm" if hybrid or letter == ATTENTION else "ffn_norm"
        table[f"{ours}.norm.weight"] = f"{block}.{norm}.weight"
        if letter == MAMBA:
            mixer = {our: their for our, their in _MAMBA.items() if our != "conv_bias" or config.conv_bias}
        else:
            hf = mixer_names(config, letter)
            mixer = {our: f"{_PARTS[their.split('.')[0]]}.{their.split('.')[1]}" for our, their in hf.items()}
        table |= {f"{ours}.mixer.{our}": f"{block}.{their}" for our, their in mixer.items()}
    return table
