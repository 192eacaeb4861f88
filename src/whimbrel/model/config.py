"""What a network is, as one frozen value. Everything else (counts, memory, the module itself) follows from it.

The pattern is one letter a layer: `M` Mamba-2, `*` attention, `-` feed-forward. One layer is `x + mixer(norm(x))`. A
classic transformer block is two layers, `*-`. Names are Hugging Face's wherever it has one. Shapes: Nemotron-H (arXiv
2504.03624) and Nemotron Nano 2 (arXiv 2508.14444), Nemotron-4 (arXiv 2402.16819, 2406.11704).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from whimbrel.errors import UserError, nearest

MAMBA, ATTENTION, FEED_FORWARD = "M", "*", "-"
LETTERS = {MAMBA: "Mamba-2", ATTENTION: "attention", FEED_FORWARD: "feed-forward"}
FAMILIES = ("nemotron_h", "nemotron", "qwen3", "llama")


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's stretching of the rotary frequencies: long waves are divided by `factor`, short ones are kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """A language model. Raises `UserError` for every combination that no network can have."""

    pattern: str
    """One letter a layer: `M` Mamba-2, `*` attention, `-` feed-forward."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int = 0
    """Width of the feed-forward layers."""
    mlp: str = "relu2"
    """`relu2`: up, squared ReLU, down. `swiglu`: SiLU(gate) * up, down."""
    mlp_bias: bool = False
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    """Width of an attention head; heads times head_dim need not be the hidden size."""
    attention_bias: bool = False
    """Bias on the q, k, v and o projections alike."""
    qk_norm: bool = False
    """RMSNorm over each head of q and k before rotary (Qwen3)."""
    rope_theta: float | None = None
    """Base of the rotary frequencies; None: no positional encoding (the hybrids)."""
    rope_fraction: float = 1.0
    """Share of each head that rotates (Nemotron-4: 0.5), rotate-half convention."""
    rope_scaling: RopeScaling | None = None
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    ssm_state_size: int = 0
    n_groups: int = 1
    """Groups of heads that share B and C; the gated norm works inside a group too."""
    conv_kernel: int = 4
    conv_bias: bool = True
    mamba_bias: bool = False
    """Bias on Mamba's in and out projections."""
    chunk_size: int = 128
    """Chunk of the scan in the published configs; a hint to kernels, never part of the mathematics."""
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    """Clamp of the step size after softplus."""
    time_step_min: float = 0.001
    """Initialisation only, as the next two: step sizes are drawn log-uniformly from [min, max], not below floor."""
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    norm: str = "rmsnorm"
    """`rmsnorm`, or `layernorm1p`: LayerNorm whose weight is stored minus one (Nemotron-4)."""
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    """Initialisation only: divide the last projection of each layer by the square root of the number of layers."""
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    family: str = "nemotron_h"
    """Which folder form it is saved in: nemotron_h, nemotron, qwen3 or llama."""

    def __post_init__(self) -> None:
        _check_pattern(self.pattern)
        _check_choice("mlp", self.mlp, ("relu2", "swiglu"))
        _check_choice("norm", self.norm, ("rmsnorm", "layernorm1p"))
        _check_choice("family", self.family, FAMILIES)
        needed = ["vocab_size", "hidden_size", "max_position_embeddings"]
        if FEED_FORWARD in self.pattern:
            needed.append("intermediate_size")
        if ATTENTION in self.pattern:
            needed += ["num_attention_heads", "num_key_value_heads", "head_dim"]
        if MAMBA in self.pattern:
            needed += ["mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"]
        for name in needed:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(
                    f"{name} is {value!r}, but this pattern needs it; set {name} to a whole number of 1 or more"
                )
        if ATTENTION in self.pattern:
            _check_divides(
                "num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads
            )
            self._check_rotary()
        if MAMBA in self.pattern:
            _check_divides("mamba_num_heads", self.mamba_num_heads, "n_groups", self.n_groups)
        low, high = self.time_step_limit
        if not 0 <= low < high:
            raise UserError(f"time_step_limit is ({low}, {high}); set it to (0.0, inf) or another rising pair")

    def _check_rotary(self) -> None:
        if self.rope_theta is not None and not self.rope_theta > 0:
            raise UserError(f"rope_theta is {self.rope_theta}; set it above 0, or to null for no positional encoding")
        if not 0 < self.rope_fraction <= 1 or self.rotary_width % 2:
            raise UserError(
                f"rope_fraction {self.rope_fraction} of head_dim {self.head_dim} turns {self.rotary_width} channels; "
                "set rope_fraction in (0, 1] so that they are an even number"
            )

    @property
    def layers(self) -> int:
        """Number of layers, counted one mixer at a time."""
        return len(self.pattern)

    def count(self, letter: str) -> int:
        """How many layers are of this letter."""
        return self.pattern.count(letter)

    def indices(self, letter: str) -> tuple[int, ...]:
        """The places of the layers of this letter."""
        return tuple(i for i, kind in enumerate(self.pattern) if kind == letter)

    @property
    def rotary_width(self) -> int:
        """Channels of a head that rotate; 0 without positional encoding."""
        return int(self.head_dim * self.rope_fraction) if self.rope_theta is not None else 0

    @property
    def mamba_inner(self) -> int:
        """H * P: the width between Mamba's two projections (`expand` in published configs is not used)."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """HP + 2GN: the convolution runs over x, B and C."""
        return self.mamba_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def in_proj_width(self) -> int:
        """2HP + 2GN + H: z, x, B, C and dt, in that order."""
        return self.mamba_inner + self.conv_channels + self.mamba_num_heads

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)


def _check_pattern(pattern: str) -> None:
    if not pattern:
        raise UserError("pattern is empty; set pattern to one letter a layer, for example M-M*-")
    for place, letter in enumerate(pattern):
        if letter not in LETTERS:
            known = ", ".join(f"{letter} {word}" for letter, word in LETTERS.items())
            raise UserError(f"pattern has {letter!r} at layer {place}; set each letter to one of: {known}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(
            f"{name} is {value!r}; {nearest(str(value), choices)} (set {name} to one of {', '.join(choices)})"
        )


def _check_divides(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        works = max(by, round(value / by) * by)
        raise UserError(
            f"{name} {value} is not divisible by {by_name} {by}; set {name} to {works}, or {by_name} to a divisor"
        )
