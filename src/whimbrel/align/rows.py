"""Rows of JSONL files, and what the stages of this room have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from whimbrel.errors import UserError
from whimbrel.model import LanguageModel
from whimbrel.model.checkpoint import resolve
from whimbrel.text import Tokenizer


def read_rows(source: Path, name: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Every row of a JSONL file; a folder stands for its NAME.jsonl. UserError for a row without one of the keys."""
    path = source / f"{name}.jsonl" if source.is_dir() else source
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a JSONL file, or a folder that holds {name}.jsonl")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            missing = [key for key in keys if key not in row]
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); write one object a line") from error
        if missing:
            raise UserError(f"{path}, line {number} has no {missing[0]!r}; give every row {', '.join(keys)}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty; write at least one row")
    return rows


def load(source: Path, device: torch.device) -> tuple[LanguageModel, Tokenizer]:
    """The model of a folder, in float32 as training wants it, and its tokenizer."""
    return LanguageModel.load(source, dtype="float32", device=device), Tokenizer.load(resolve(source))


def check_share(name: str, value: float) -> None:
    """Raise `UserError` unless the setting lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}; set {name} between 0 and 1")
