"""Answers on disk by what they depend on: one append-only JSONL file a model, `MODEL.jsonl`, a part of a run a line.

A row's key is the digest of the model's files, the number format, the prompt and the sampling, seed and budget among
it. An answer's score is no part of it, so scoring can change without a token being computed again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from whimbrel.engine import Sampling
from whimbrel.errors import UserError

FORM = 1
"""Grows when the engine answers otherwise or a row changes; older rows are then made again."""
_FILES = ("config.json", "generation_config.json", "tokenizer*.json", "*.jinja", "*.safetensors", "*.gguf")


def digest(folder: Path) -> str:
    """The key of a model's folder or file: 16 hexadecimal digits over what an answer depends on."""
    found = hashlib.sha256()
    for path in [folder] if folder.is_file() else sorted({path for form in _FILES for path in folder.glob(form)}):
        with open(path, "rb") as file:
            found.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()[:16]


def key(prompt: Any, sampling: Sampling, *about: str) -> str:
    """The key of one answer."""
    text = json.dumps([FORM, *about, prompt, asdict(sampling)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class Generations(dict[str, Mapping[str, Any]]):
    """The rows of one file by key, read at the start; use it as a context. A second process that writes is refused."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+")  # noqa: SIM115, closed by the context that this is
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise UserError(f"another run writes {path}; wait for it, or set generations to another folder") from error
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        if torn:  # cut off while it was written
            self._file.truncate(sum(len(line) + 1 for line in lines))
        super().__init__()
        for number, line in enumerate(lines, 1):
            try:
                self.update({row["key"]: row for row in json.loads(line)})
            except (ValueError, TypeError, KeyError):
                self._file.close()
                raise UserError(
                    f"{path}, line {number}, is damaged; remove that line: its answers are then made again"
                ) from None

    def __enter__(self) -> Generations:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep rows (each with its `key`), all of them or, where the process dies, none."""
        rows = list(rows)
        self._file.write(json.dumps(rows).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.update((row["key"], row) for row in rows)
