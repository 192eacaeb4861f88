"""What a sequence carries from token to token: keys and values for attention, convolution tail and SSM state for
Mamba-2.

This file owns shapes and views; `engine/pool.py` owns who uses which slot and which block. S slots, I channels of the
convolution, W its width, H heads, P head width, N state size, K key/value heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whimbrel.model.config import ATTENTION, MAMBA, ModelConfig
from whimbrel.ops.memory import HUGE, huge

AMPLE = 1 << 30
"""Bytes that the first tokens of all sequences may take in huge pages: one page of every tensor each."""


@dataclass(eq=False)
class State:
    """The memory of all sequences, one tensor a layer. The SSM state is float32 whatever the model's dtype, or
    float16, rounded at random as it advances.
    """

    conv: dict[int, Tensor]
    """Layer -> tail_SI(W-1): the last inputs of the convolution, oldest first. Channels are neighbours in memory."""
    ssm: dict[int, Tensor]
    """Layer -> state_SHPN, float32 or float16."""
    k: dict[int, Tensor]
    """Layer -> [blocks, block size, K, E]."""
    v: dict[int, Tensor]
    block_size: int

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        *,
        slots: int,
        blocks: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        ssm_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> State:
        """Room for `slots` recurrent states (zeros) and `blocks` blocks of `block_size` tokens (any values) in
        `kv_dtype` (None: `dtype`).
        """
        tail = (slots, config.conv_kernel - 1, config.conv_channels)
        state = (slots, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        block = (blocks, block_size, config.num_key_value_heads, config.head_dim)
        mamba, attention = config.indices(MAMBA), config.indices(ATTENTION)
        # Each sequence of a pool begins in a part of its own: its first token takes a page of every tensor.
        far = 2 * len(attention) * slots * HUGE > AMPLE

        def room() -> Tensor:
            some = torch.empty(block, dtype=kv_dtype or dtype, device=device)
            return some if far else huge(some)

        return cls(
            conv={i: huge(torch.zeros(tail, dtype=dtype, device=device)).transpose(1, 2) for i in mamba},
            ssm={i: huge(torch.zeros(state, dtype=ssm_dtype, device=device)) for i in mamba},
            # Not filled: a place is written before it is read, and on a CPU untouched pages cost nothing.
            k={i: room() for i in attention},
            v={i: room() for i in attention},
            block_size=block_size,
        )

    def bytes(self) -> dict[str, int]:
        """Bytes held, by kind: conv, ssm, kv."""
        size = {"conv": self.conv, "ssm": self.ssm}
        held = {kind: sum(t.nbytes for t in tensors.values()) for kind, tensors in size.items()}
        return held | {"kv": sum(t.nbytes for side in (self.k, self.v) for t in side.values())}
