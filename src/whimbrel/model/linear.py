"""Projections and embeddings whose weights have few bits. They are for inference: nothing here takes a gradient.

In the state dict such a matrix is NAME.weight.codes and NAME.weight.scales, as on disk. O outputs, I inputs, V
vocabulary, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from whimbrel import ops
from whimbrel.errors import UserError
from whimbrel.ops import packed
from whimbrel.ops.packed import Packed


class Linear(nn.Linear):
    """A projection of floats; its product is one of `ops`."""

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        return ops.linear(x_TI, self.weight, self.bias)


class PackedWeight(nn.Module):
    """Stands where a weight parameter stood; `value` is what `ops` takes, `dtype` that of the arithmetic."""

    scales: Tensor | None

    def __init__(self, value: Packed, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.bits, self.group, self.form = value.shape, value.bits, value.group, value.form
        self.dtype = dtype
        self.register_buffer("codes", value.codes)
        self.register_buffer("scales", value.scales)

    @property
    def value(self) -> Packed:
        """The matrix, in the tensors this module holds now."""
        codes = self._buffers["codes"]
        assert codes is not None
        return Packed(codes, self._buffers["scales"], self.shape, self.bits, self.group, self.form)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.value.codes.device


class PackedLinear(nn.Module):
    """x W^T + bias."""

    def __init__(self, value: Packed, bias_O: nn.Parameter | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = PackedWeight(value, dtype)
        self.bias = bias_O

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        return ops.linear(x_TD, self.weight.value, self.bias)


class PackedEmbedding(nn.Module):
    """Rows of a packed matrix [V, D], in the dtype of the arithmetic."""

    def __init__(self, value: Packed, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = PackedWeight(value, dtype)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """[T] -> [T, D]."""
        return packed.rows(self.weight.value, tokens_T).to(self.weight.dtype)


def matrices(model: Any) -> dict[str, Tensor | Packed]:
    """The weight of every projection, of the embedding and of a head of its own, by the name of its module."""
    found: dict[str, Tensor | Packed] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | PackedLinear | PackedEmbedding) or name == "head":
            weight = getattr(module, "weight", None)
            found |= {} if weight is None else {name: weight.value if isinstance(weight, PackedWeight) else weight}
    return found


def place(model: Any, name: str, value: Packed, dtype: torch.dtype = torch.float32) -> None:
    """Put a packed matrix where one of the same shape stood; `name` is one of `matrices`. A tied head follows.

    `dtype` is that of the arithmetic: float32 but on a GPU.
    """
    if name == "head":
        model.head._parameters.pop("weight", None)
        model.head.weight = PackedWeight(value, dtype)
    elif name == "embeddings":
        model.embeddings = PackedEmbedding(value, dtype)
        if model.config.tie_embeddings:
            model.head.tie(model.embeddings)
    else:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, PackedLinear(value, model.get_submodule(name).bias, dtype))
    model.touch()


@torch.no_grad()
def pack_model(model: Any, bits: int, group: int = 32) -> None:
    """Round every matrix of a `LanguageModel` to the nearest of few bits, in place: projections, embedding, head."""
    for name, weight in matrices(model).items():
        assert isinstance(weight, Tensor), f"{name} is packed already"
        place(model, name, _round(weight, bits, group))


def _round(weight_OI: Tensor, bits: int, group: int) -> Packed:
    inputs = weight_OI.shape[1]
    if bits != 16 and (group not in packed.GROUPS or inputs % group):
        works = [size for size in packed.GROUPS if inputs % size == 0]
        raise UserError(
            f"group_size is {group}, but a matrix has {inputs} inputs; "
            + (f"set group_size to {works[-1]}" if works else "set bits to 16: 32 does not divide that number")
        )
    return packed.round_to_nearest(weight_OI, bits, group)
