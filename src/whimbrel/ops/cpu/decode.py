"""One token of a few sequences through a whole network in one native call (native/src/decode.cpp).

The structs are those of native/src/whimbrel.h. `model/decoding.py` fills them; the twin is the model in `ops/torch`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from whimbrel.ops.cpu.library import call
from whimbrel.ops.cpu.matrix import Matrix, Projection


def _fields(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for name in names.split())


class Layer(ctypes.Structure):
    """Weights of a layer, and the state of all sequences in it."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "norm norm_bias"),
        *_fields(Projection, "first second third last"),
        *_fields(ctypes.c_void_p, "conv_weight conv_bias a_log d dt_bias gated_norm q_norm k_norm"),
        *_fields(ctypes.c_void_p, "conv ssm keys values"),
        ("kind", ctypes.c_int64),
    )


class Decode(ctypes.Structure):
    """A step of decoding through layers that must outlive it."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("embeddings", Matrix),
        *_fields(ctypes.c_void_p, "norm norm_bias tokens slots lengths table frequencies hidden"),
        *_fields(ctypes.c_int64, "count rows width heads kv_heads head_width half block_size table_stride kv_half"),
        *_fields(ctypes.c_int64, "mamba_heads mamba_width groups state_size conv_width"),
        *_fields(ctypes.c_float, "eps least_step most_step"),
    )

    def run(self, tokens_S: Tensor, slots_S: Tensor, lengths_S: Tensor, table: Tensor | None) -> Tensor:
        """hidden_SD after the final norm. int64 all; `lengths` counts the keys with the present; table [S, blocks]."""
        hidden_SD = torch.empty(len(tokens_S), self.width)
        self.rows, self.tokens, self.slots = len(tokens_S), tokens_S.data_ptr(), slots_S.data_ptr()
        self.lengths, self.hidden = lengths_S.data_ptr(), hidden_SD.data_ptr()
        if table is not None:
            assert table.stride(1) == 1
            self.table, self.table_stride = table.data_ptr(), table.stride(0)
        call("decode", self)
        return hidden_SD


def network(count: int) -> tuple[Any, Decode]:
    """Room for `count` layers, and a step through them."""
    layers = (Layer * count)()
    return layers, Decode(layers=ctypes.addressof(layers), count=count)
