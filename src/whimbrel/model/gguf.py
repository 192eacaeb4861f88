"""GGUF files of the llama architecture: config, weights and names. Needs the package `gguf` (extra `gguf`).

Weights are dequantised to float32 one tensor at a time: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, the K-quants.
Not read: other architectures, experts, sliding windows, widths that differ between layers, rotary scaling that is not
Llama-3.1's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whimbrel.errors import UserError, need
from whimbrel.model.config import ModelConfig, RopeScaling
from whimbrel.model.positions import frequencies

ROTATED = re.compile(r"attn_(q|k)\.(weight|bias)$")
ROPE_FACTORS = "rope_freqs.weight"


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
        self.shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}
        self.config = self._config()
        self.shapes.pop(ROPE_FACTORS, None)  # it has become config.rope_scaling

    def field(self, name: str, default: Any = None) -> Any:
        """A value of the metadata."""
        field = self._reader.fields.get(name)
        return default if field is None else field.contents()

    def read(self, name: str) -> Tensor:
        """One tensor as float32, q and k in the order of Hugging Face (and ours)."""
        entry = self._tensors[name]
        try:
            values = self._dequantize(entry.data, entry.tensor_type).reshape(self.shapes[name])
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: tensor {name} is stored as {entry.tensor_type.name}, which is not read here"
            ) from error
        tensor = torch.from_numpy(np.array(values, dtype=np.float32))
        if not (match := ROTATED.search(name)):
            return tensor
        heads = self.config.num_attention_heads if match[1] == "q" else self.config.num_key_value_heads
        return halves(tensor, heads)

    def _size(self, name: str, default: int | None = None) -> int:
        value = self.field(f"llama.{name}", default)
        if not isinstance(value, int):
            found = "missing" if value is None else f"{value!r}, which differs between layers"
            raise UserError(f"{self.path}: llama.{name} is {found}; read are files where it is one whole number")
        return value

    def _config(self) -> ModelConfig:
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise UserError(f"{self.path} has the architecture {architecture!r}; read is 'llama'")
        for name in ("llama.expert_count", "llama.attention.sliding_window"):
            if self.field(name, 0):
                raise UserError(f"{self.path} says {name} {self.field(name)}, which is not computed here")
        if "token_embd.weight" not in self.shapes:
            raise UserError(f"{self.path} lacks tensor token_embd.weight; copy the file again")
        heads, hidden = self._size("attention.head_count"), self._size("embedding_length")
        head_dim = self._size("attention.key_length", hidden // heads)
        if (turning := self._size("rope.dimension_count", head_dim)) != head_dim:
            raise UserError(
                f"{self.path} rotates {turning} of {head_dim} channels of a head; read are files that rotate all"
            )
        theta = float(self.field("llama.rope.freq_base", 10_000.0))
        layers, bos, eos, pad = (
            self._size("block_count"),
            *(self.field(f"tokenizer.ggml.{n}_token_id") for n in ("bos", "eos", "padding")),
        )
        turns = {
            i
            for i in (eos, self.field("tokenizer.ggml.eot_token_id"), self.field("tokenizer.ggml.eom_token_id"))
            if i is not None
        }
        return ModelConfig(
            family="llama",
            pattern="*-" * layers,
            vocab_size=self.shapes["token_embd.weight"][0],
            hidden_size=hidden,
            intermediate_size=self._size("feed_forward_length"),
            mlp="swiglu",
            mlp_bias="blk.0.ffn_up.bias" in self.shapes,
            num_attention_heads=heads,
            num_key_value_heads=self._size("attention.head_count_kv", heads),
            head_dim=head_dim,
            attention_bias="blk.0.attn_q.bias" in self.shapes,
            rope_theta=theta,
            rope_scaling=self._scaling(theta, head_dim),
            norm_eps=float(
                f"{self.field('llama.attention.layer_norm_rms_epsilon'):.7g}"
            ),  # stored as float32: 1e-5, not 9.99e-6
            tie_embeddings="output.weight" not in self.shapes,
            max_position_embeddings=self._size("context_length"),
            rescale_prenorm_residual=False,
            bos_token_id=bos,
            eos_token_id=tuple(sorted(turns)) if len(turns) > 1 else eos,
            pad_token_id=pad,
        )

    def _scaling(self, theta: float, head_dim: int) -> RopeScaling | None:
        """Llama-3.1's scaling, which GGUF keeps as one divisor for each frequency; `UserError` for any other."""
        kind = self.field("llama.rope.scaling.type", "none")
        if kind not in ("none", "llama3"):
            raise UserError(
                f"{self.path} says llama.rope.scaling.type {kind!r}, which is not computed here; read is Llama-3.1's"
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


def halves(tensor: Tensor, heads: int) -> Tensor:
    """[heads * E, ...]: each head's rows from GGUF's order, where channels that turn together adjoin, to halves."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def names(config: ModelConfig) -> dict[str, str]:
    """Our name -> the name in a GGUF file."""
    table = {"embeddings.weight": "token_embd.weight", "norm_f.weight": "output_norm.weight"}
    if not config.tie_embeddings:
        table["head.weight"] = "output.weight"
    attention = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    mlp = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for layer, letter in enumerate(config.pattern):
        ours, block = f"layers.{layer}", f"blk.{layer // 2}"
        is_attention = letter == "*"
        table[f"{ours}.norm.weight"] = f"{block}.{'attn' if is_attention else 'ffn'}_norm.weight"
        parts = ("weight", "bias") if (config.attention_bias if is_attention else config.mlp_bias) else ("weight",)
        for our, their in (attention if is_attention else mlp).items():
            table |= {f"{ours}.mixer.{our}.{part}": f"{block}.{their}.{part}" for part in parts}
    return table
