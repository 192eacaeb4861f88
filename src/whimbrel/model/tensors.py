"""Tensors in safetensors files: found without being read, read one at a time, written in shards.

Nothing here knows a model. Pickles are refused: reading one can run code. Every error names the file and the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from whimbrel.errors import UserError

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LINE = 64
"""Bytes of a cache line."""
KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""What is read and written; whole numbers are the codes of few bits."""


class SafeTensors:
    """The tensors of a folder: one `model.safetensors`, or the shards that `model.safetensors.index.json` lists."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        promised = self._index()
        for file in sorted(set(promised.values())) if promised else [self._single()]:
            self._open(file)
        for name, file in promised.items():
            if self.files.get(name) != file:
                raise UserError(
                    f"{self.folder / INDEX} promises tensor {name} in {file.name}, but it is not there; copy it again"
                )

    def read(self, name: str) -> Tensor:
        """One tensor, a view of the mapped file: copy what you keep and let go of it, so that it leaves memory."""
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def _index(self) -> dict[str, Path]:
        """Tensor -> file as the index says; empty without an index."""
        path = self.folder / INDEX
        if not path.exists():
            return {}
        try:
            table = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            return {name: self.folder / Path(file).name for name, file in table.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not an index of tensors ({error}); copy the file again") from error

    def _single(self) -> Path:
        file = self.folder / "model.safetensors"
        if file.exists():
            return file
        pickles = sorted(entry.name for entry in self.folder.iterdir() if entry.suffix in PICKLES)
        if pickles:
            raise UserError(
                f"{self.folder} holds {pickles[0]}: a pickle can run code and is never read; save it as safetensors"
            )
        raise UserError(f"{self.folder} has no model.safetensors and no {INDEX}; copy the whole folder of the model")

    def _open(self, file: Path) -> None:
        if not file.exists():
            raise UserError(f"{file} is listed in {INDEX} but missing; copy the whole folder of the model")
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    entry = opened.get_slice(name)
                    kinds = [kind for kind in KINDS.values() if kind[0] not in "IU" or name.endswith(".codes")]
                    if entry.get_dtype() not in kinds:
                        raise UserError(
                            f"{file}: tensor {name} is stored as {entry.get_dtype()}; read are {', '.join(kinds)}"
                        )
                    self.files[name], self.shapes[name] = file, tuple(entry.get_shape())
        except SafetensorError as error:
            raise UserError(f"{file} {_fault(file) or error}; copy the file again") from error


def _fault(file: Path) -> str:
    """What is wrong with a file that safetensors cannot open; empty if this cannot tell."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        data = 8 + int.from_bytes(opened.read(8), "little")
        if size < 8 or data > size:
            return f"is cut off in its header or is no safetensors file ({size:,} bytes)"
        try:
            header = json.loads(opened.read(data - 8))
            ends = {name: data + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError):
            return "has a header that cannot be read"
    cut = [name for name, end in ends.items() if end > size]
    if not cut:
        return ""
    first = min(cut, key=ends.__getitem__)
    return f"is cut off in tensor {first}: {size:,} of {max(ends.values()):,} bytes"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `offset` bytes into a file."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def write(tensors: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Write tensors in their order as one file, or as shards of at most `shard_bytes` bytes with an index."""
    for file, shard in _shards(tensors, folder, shard_bytes):
        head, order, _ = _head(shard)
        with open(file, "wb") as sink:
            sink.write(head)
            for name in order:
                numbers = shard[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                numbers.numpy().tofile(sink)


def reserve(tensors: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> dict[str, Place]:
    """The files that `write` would write, with zeros for numbers; returns where each tensor belongs."""
    places = {}
    for file, shard in _shards(tensors, folder, shard_bytes):
        head, order, offsets = _head(shard)
        with open(file, "wb") as sink:
            sink.write(head)
            sink.truncate(len(head) + sum(tensor.nbytes for tensor in shard.values()))
        for name in order:
            places[name] = Place(file, len(head) + offsets[name], tuple(shard[name].shape), shard[name].dtype)
    return places


def _shards(tensors: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> list[tuple[Path, dict[str, Tensor]]]:
    """What goes into which file; more than one get an index, which is written here."""
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        return [(folder / "model.safetensors", shards[0])]
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    table = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": table}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [(folder / file, shard) for file, shard in zip(files, shards, strict=True)]


def _head(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str], dict[str, int]]:
    """The header of one file, the order of its tensors, and where each begins behind the header.

    Tensors begin on cache lines if they are as large as that, so that they can be used where they lie. The format
    leaves no holes: those whose size is a multiple of a line come first.
    """
    order = sorted(tensors, key=lambda name: -min(LINE, tensors[name].nbytes & -tensors[name].nbytes))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name in order:
        tensor = tensors[name]
        begins[name], end = end, end + tensor.nbytes
        header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begins[name], end]}
    head = json.dumps(header).encode()
    head += b" " * (-(len(head) + 8) % LINE)
    return len(head).to_bytes(8, "little") + head, order, begins
