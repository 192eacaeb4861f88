"""The tokenizer's files in a Hugging Face folder: vocabulary, special tokens, chat template, end tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from whimbrel.errors import UserError
from whimbrel.files import atomic_write
from whimbrel.text import chat

NANO2_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "add_bos_token": False,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "chat_template": chat.TEMPLATE,
}
"""tokenizer_config.json of a vocabulary that we train: the reserved slots by name, and the Nano 2 chat format."""


def place(source: str | Path) -> Path:
    """Where a tokenizer's files lie: the folder of a stage that made a model stands for the `model` in it."""
    path = Path(source)
    inner = path / "model"
    return inner if (inner / "tokenizer.json").exists() and not (path / "tokenizer.json").exists() else path


def read_backend(source: str | Path) -> Backend:
    """The vocabulary in tokenizer.json, with any truncation or padding in it switched off."""
    path = place(source) / "tokenizer.json"
    text = _read(path)
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} is broken or of an unknown kind ({error}); fetch it again") from error
    if not backend.get_vocab_size():
        raise UserError(f"{path} has an empty vocabulary; fetch it again")
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_config(source: str | Path) -> dict[str, Any]:
    """tokenizer_config.json, with the chat template wherever it lies (chat_template.jinja wins) as one text."""
    config = _read_json(place(source) / "tokenizer_config.json")
    beside = place(source) / "chat_template.jinja"
    template = _read(beside) if beside.exists() else config.get("chat_template")
    if isinstance(template, list):  # older folders: several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    config.pop("chat_template", None)
    return config if template is None else config | {"chat_template": template}


def read_eos_ids(source: str | Path) -> list[int]:
    """End tokens that the model's own files name: generation_config.json, or config.json where that says nothing."""
    for name in ("generation_config.json", "config.json"):
        path = place(source) / name
        found = _read_json(path).get("eos_token_id") if path.exists() else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(isinstance(i, int) and i >= 0 for i in ids):
                raise UserError(f"{path}: eos_token_id is {found!r}; set it to an id or a list of ids")
            return ids
    return []


def special_tokens(config: Mapping[str, Any], backend: Backend) -> dict[str, str]:
    """`bos_token`, `eos_token`, … of a tokenizer_config.json as texts, each held to be in the vocabulary."""
    found = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            if backend.token_to_id(text) is None:
                raise UserError(
                    f"{key} {text!r} of tokenizer_config.json is not in tokenizer.json; mend one of the two"
                )
            found[key] = text
    return found


def write(target: str | Path, backend: Backend, config: Mapping[str, Any]) -> None:
    """Both files into a folder, made if need be; a chat_template.jinja there would win over ours, so it goes."""
    target = Path(target)
    with atomic_write(target / "tokenizer.json") as file:
        file.write(backend.to_str(pretty=True))
    with atomic_write(target / "tokenizer_config.json") as file:
        json.dump(config, file, ensure_ascii=False, indent=2)
    (target / "chat_template.jinja").unlink(missing_ok=True)


def _read(path: Path) -> str:
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder; set it to a folder that holds {path.name}")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; fetch the folder again with its tokenizer files") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not an object; fetch it again")
    return found
