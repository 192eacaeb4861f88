"""A layer of decoding in one native call (native/src/step.cpp): x + mixer(rms_norm(x)), one token of a few sequences.

Their twin is the layer itself in `ops/torch`. Each returns None where the library cannot do it: other dtypes, weights
that are not rows in a row, more than 8 sequences.
S sequences, D model width, K key/value heads, E head width, R half of the rotating channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from whimbrel.ops.cpu.library import address, call, fits, structure

_Attention = structure(
    "AttentionStep",
    "x norm wq wk wv wo bq bk bv bo q_norm k_norm cos sin k v y table lengths",
    "rows width heads kv_heads head_width half block_size table_stride",
    "eps",
)
_Mlp = structure("MlpStep", "x norm up gate down up_bias gate_bias down_bias y", "rows width wide", "eps")


def _plain(*tensors: Tensor | None) -> bool:
    return fits(*tensors) and all(t is None or t.is_contiguous() for t in tensors)


def attention_step(
    x_SD: Tensor,
    norm_D: Tensor,
    eps: float,
    projections: tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear],
    norms: tuple[Tensor | None, Tensor | None],
    rotation: tuple[Tensor, Tensor] | None,
    pools: tuple[Tensor, Tensor],
    table: Tensor,
    key_counts_S: Tensor,
) -> Tensor | None:
    """An attention layer [S, D]: q, k, v, o projections; norms over E; cos and sin [S, R]; blocks of keys and values.

    Key and value of the present token are written to their place: `key_counts_S` counts the keys with it.
    """
    weights, biases = [p.weight for p in projections], [p.bias for p in projections]
    cos, sin = rotation if rotation is not None else (None, None)
    if not _plain(x_SD, norm_D, *weights, *biases, *norms, cos, sin, *pools) or table.stride(1) != 1:
        return None
    _, block_size, kv_heads, width = pools[0].shape
    y_SD = torch.empty_like(x_SD)
    pointers = [x_SD, norm_D, *weights, *biases, *norms, cos, sin, *pools, y_SD, table, key_counts_S]
    numbers = (*x_SD.shape, weights[0].shape[0] // width, kv_heads, width, 0 if cos is None else cos.shape[1])
    call("attention_step", _Attention(*map(address, pointers), *numbers, block_size, table.stride(0), eps))
    return y_SD


def mlp_step(
    x_SD: Tensor, norm_D: Tensor, eps: float, up: nn.Linear, gate: nn.Linear | None, down: nn.Linear
) -> Tensor | None:
    """A feed-forward layer [S, D]: squared ReLU, or SwiGLU if there is a gate."""
    gate_weight, gate_bias = (None, None) if gate is None else (gate.weight, gate.bias)
    y_SD = torch.empty_like(x_SD)
    pointers = [x_SD, norm_D, up.weight, gate_weight, down.weight, up.bias, gate_bias, down.bias, y_SD]
    if not _plain(*pointers):
        return None
    call("mlp_step", _Mlp(*map(address, pointers), *x_SD.shape, up.weight.shape[0], eps))
    return y_SD
