"""Tensors in safetensors files: found without being read, read one at a time, written in shards.

Nothing here knows a model. Pickles are refused: reading one can run code. Every error names the file and the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from whimbrel.errors import UserError

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
READABLE = ("F64", "F32", "F16", "BF16")


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
                    if entry.get_dtype() not in READABLE:
                        raise UserError(
                            f"{file}: tensor {name} is stored as {entry.get_dtype()}; read are {', '.join(READABLE)}"
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


def write(tensors: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Write tensors in their order as one file, or as shards of at most `shard_bytes` bytes with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        return _write(shards[0], folder / "model.safetensors")
    table: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(shard, folder / file)
        table |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": table}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(tensors: Mapping[str, Tensor], file: Path) -> None:
    with torch.no_grad():
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            file,
            metadata={"format": "pt"},
        )
