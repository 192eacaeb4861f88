"""Folders whose matrices have few bits: what their config says, the names of their tensors, and a model ready for them.

A matrix NAME.weight of 8 or 4 bits is the two tensors NAME.weight.codes and NAME.weight.scales, laid out as the native
kernels read them (`ops/packed.py`), so that a mapped file is used in place. Matrices that stay at 16 bits are ordinary
float16 tensors. In memory all of them are packed. On a GPU those of few bits are turned into rows as they are loaded,
and those of 16 bits are plain ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whimbrel.errors import UserError
from whimbrel.model.linear import matrices, place
from whimbrel.ops import fp8, packed
from whimbrel.ops.packed import GROUPS, pack

METHOD = "whimbrel"


@dataclass(frozen=True)
class FewBits:
    """How the matrices of a model are stored: `bits` each and a scale for `group` inputs, but 16 bits for some."""

    bits: int
    group: int = 0
    kept: tuple[str, ...] = ()
    """Modules that stay at 16 bits, by their names on disk."""

    @property
    def name(self) -> str:
        """As `whimbrel plan --dtype` says it: int4, or int4/64 where groups are not of 32 inputs."""
        return f"int{self.bits}" + (f"/{self.group}" if self.group != 32 else "")


def from_config(raw: Mapping[str, Any], where: str) -> FewBits | None:
    """What the `quantization_config` of a folder that this package wrote says; None without one."""
    said = raw.get("quantization_config")
    if said is None:
        return None
    form = FewBits(said.get("bits"), said.get("group_size"), tuple(said.get("modules_not_to_convert", ())))
    if form.bits not in (8, 4) or form.group not in GROUPS:
        raise UserError(f"{where} says quantization_config {said}; read are bits 8 or 4 and group_size 32, 64 or 128")
    return form


def to_config(model: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """The `quantization_config` of a model with matrices of few bits; nothing for any other."""
    held = {name: weight for name, weight in matrices(model).items() if not isinstance(weight, Tensor)}
    few = {(weight.bits, weight.group) for weight in held.values() if weight.bits < 16}
    if not few:
        return {}
    ((bits, group),) = few
    kept = [_module(names, name) for name, weight in held.items() if weight.bits == 16]
    said = {"quant_method": METHOD, "bits": bits, "group_size": group, "modules_not_to_convert": kept}
    return {"quantization_config": said}


def prepare(model: Any, form: FewBits, names: Mapping[str, str], where: str, rows: bool = False) -> None:
    """Put packed matrices where a model on the meta device has plain ones. With `rows` those of 16 bits stay plain."""
    found = matrices(model)
    if unknown := set(form.kept) - {_module(names, name) for name in found}:
        raise UserError(f"{where}: modules_not_to_convert names {min(unknown)}, which is no matrix of this model")
    for name, weight in found.items():
        outputs, inputs = weight.shape
        bits = 16 if _module(names, name) in form.kept else form.bits
        if bits == 16 and rows:
            continue
        if bits != 16 and inputs % form.group:
            raise UserError(
                f"{where}: group_size {form.group} does not divide the {inputs} inputs of {_module(names, name)}; "
                "name it in modules_not_to_convert, or use the folder's own config.json"
            )
        scale_OG = None if bits == 16 else torch.empty(outputs, inputs // form.group, device="meta")
        place(model, name, pack(torch.empty(outputs, inputs, device="meta"), scale_OG, bits))


def settle(model: Any, dtype: torch.dtype, tensor: str = "") -> None:
    """Turn matrices of few bits into rows, as a GPU reads them, to compute in `dtype`: all of a model, or the one whose
    scales have just been read into the `tensor` of that name.
    """
    names = [tensor.removesuffix(".weight.scales")] if tensor.endswith(".weight.scales") else []
    for name in names if tensor else matrices(model):
        value = getattr(model.get_submodule(name).weight, "value", None)
        if value is not None and value.bits < 16 and value.form == "panels":
            place(model, name, packed.by_rows(value), dtype)


def to_fp8(model: Any, tensor: str = "") -> None:
    """Round projections to FP8, as `ops/fp8.py` multiplies: all of a model, or the one whose weights have just been
    read into the `tensor` of that name. Embedding and head stay, and what has inputs that are no multiple of 16.
    """
    names = [tensor.removesuffix(".weight")] if tensor.endswith(".weight") else []
    for name in names if tensor else matrices(model):
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear) and not module.in_features % fp8.SIDE:
            place(model, name, fp8.weight(module.weight.detach()), module.weight.dtype)


def on_disk(model: Any, names: Mapping[str, str]) -> dict[str, str]:
    """Our name of every tensor that a model holds -> its name on disk. `names` is the family's table.

    Raises `UserError` for a model whose matrices lie as a GPU reads them.
    """
    table = {}
    for name, weight in matrices(model).items():
        if not isinstance(weight, Tensor) and weight.form != "panels":
            raise UserError(
                f"matrix {name} lies in the form {weight.form!r}, which only a GPU's kernels read; load the model with "
                "device cpu and dtype float32 to save it"
            )
    bits = {name: 16 if isinstance(weight, Tensor) else weight.bits for name, weight in matrices(model).items()}
    for ours in model.state_dict():
        whole, _, leaf = ours.rpartition(".")
        if leaf not in ("codes", "scales"):
            table[ours] = names[ours]
        else:
            table[ours] = names[whole] + ("" if bits[whole.removesuffix(".weight")] == 16 else f".{leaf}")
    return table


def _module(names: Mapping[str, str], name: str) -> str:
    return names[f"{name}.weight"].removesuffix(".weight")
