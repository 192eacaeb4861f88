"""A layer of decoding in one native call (native/src/step.cpp): x + mixer(rms_norm(x)), one token of a few sequences.

Their twin is the layer itself in `ops/torch`. The C struct of a layer is kept from call to call; its pointers are set
anew when a weight lies elsewhere than it lay.
S sequences, D model width, K key/value heads, E head width, R half of the rotating channels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from whimbrel.ops.cpu.library import call, fits, structure

_ATTENTION = structure(
    "AttentionStep",
    "x norm wq wk wv wo bq bk bv bo q_norm k_norm cos sin k v y table lengths",
    "rows width heads kv_heads head_width half block_size table_stride",
    "eps",
)
_MLP = structure("MlpStep", "x norm up gate down up_bias gate_bias down_bias y", "rows width wide", "eps")


class _Step:
    """A C struct in which the addresses of one layer's weights stand."""

    def __init__(self, kind: type[ctypes.Structure], names: str) -> None:
        self.struct, self.names = kind(), names.split()
        self.addresses: list[int | None] = []
        self.fits = False

    def set(self, weights: Sequence[Tensor | None], eps: float) -> bool:
        """Point to these weights; False if the library cannot take them."""
        addresses = [None if w is None else w.data_ptr() for w in weights]
        if addresses != self.addresses:
            self.addresses, self.struct.eps = addresses, eps
            self.fits = fits(*weights) and all(w is None or w.is_contiguous() for w in weights)
            for name, address in zip(self.names, addresses, strict=True):
                setattr(self.struct, name, address)
        return self.fits

    def run(self, function: str, x_SD: Tensor) -> Tensor:
        """Call the library on the rows of x."""
        y_SD, s = torch.empty_like(x_SD), self.struct
        s.x, s.y, s.rows, s.width = x_SD.data_ptr(), y_SD.data_ptr(), *x_SD.shape
        call(function, s)
        return y_SD


class AttentionStep(_Step):
    """An attention layer; weights in the order norm, q, k, v, o, their four biases, norms of q and k."""

    def __init__(self) -> None:
        super().__init__(_ATTENTION, "norm wq wk wv wo bq bk bv bo q_norm k_norm")

    def __call__(
        self,
        x_SD: Tensor,
        weights: Sequence[Tensor | None],
        eps: float,
        rotation: tuple[Tensor, Tensor] | None,
        pools: tuple[Tensor, Tensor],
        table: Tensor,
        key_counts_S: Tensor,
    ) -> Tensor | None:
        """[S, D], or None where the library cannot. cos and sin [S, R]; blocks of keys and values, and whose they are.

        Key and value of the present token are written to their place: `key_counts_S` counts the keys with it.
        """
        keys, values = pools
        if not (self.set(weights, eps) and fits(x_SD, keys) and x_SD.is_contiguous() and table.stride(1) == 1):
            return None
        s, queries = self.struct, weights[1]
        assert queries is not None
        s.k, s.v, s.table, s.lengths = keys.data_ptr(), values.data_ptr(), table.data_ptr(), key_counts_S.data_ptr()
        _, s.block_size, s.kv_heads, s.head_width = keys.shape
        s.heads, s.table_stride = queries.shape[0] // keys.shape[3], table.stride(0)
        if rotation is not None:
            s.cos, s.sin, s.half = rotation[0].data_ptr(), rotation[1].data_ptr(), rotation[0].shape[1]
        return self.run("attention_step", x_SD)


class MlpStep(_Step):
    """A feed-forward layer; weights in the order norm, up, gate (None: squared ReLU), down, and the biases of these."""

    def __init__(self) -> None:
        super().__init__(_MLP, "norm up gate down up_bias gate_bias down_bias")

    def __call__(self, x_SD: Tensor, weights: Sequence[Tensor | None], eps: float) -> Tensor | None:
        """[S, D], or None where the library cannot."""
        up = weights[1]
        if not (self.set(weights, eps) and fits(x_SD) and x_SD.is_contiguous()) or up is None:
            return None
        self.struct.wide = up.shape[0]
        return self.run("mlp_step", x_SD)
