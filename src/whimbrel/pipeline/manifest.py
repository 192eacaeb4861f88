"""What a finished stage was made of: `STAGE/manifest.json`, and the key that says whether it still stands.

A key is the SHA-256 of (stage, its integer version, its resolved settings, the keys of its inputs). The key of a file
is that of its bytes. So a change anywhere upstream changes every key below it, and nothing else does.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from whimbrel.errors import UserError
from whimbrel.files import atomic_write

SCHEMA = 1
NAME = "manifest.json"


def stage_key(stage: str, stage_version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The key of a stage: 64 hexadecimal digits over everything its output depends on."""
    text = json.dumps([SCHEMA, stage, stage_version, settings, dict(inputs)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class FileKeys:
    """Keys of files and folders that come from outside. Hashes are remembered by path, size and time of change."""

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        self.known: dict[str, str] = json.loads(memory.read_text()) if memory.exists() else {}

    def key(self, path: Path) -> str:
        """SHA-256 of a file's bytes, or of the names and keys of a folder's files."""
        if path.is_dir():
            parts = [
                (str(file.relative_to(path)), self.key(file)) for file in sorted(path.rglob("*")) if file.is_file()
            ]
            return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        state = path.stat()
        mark = f"{path.resolve()}:{state.st_size}:{state.st_mtime_ns}"
        if mark not in self.known:
            with open(path, "rb") as file:
                self.known[mark] = hashlib.file_digest(file, "sha256").hexdigest()
            write_json(self.memory, self.known)
        return self.known[mark]


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON; the file is whole or absent."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, None if it has none; one of another schema is refused by name."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a manifest ({error!r}); move {folder} away to make it again") from error
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema}, this version reads {SCHEMA}; move {folder} away to make it again")
    return dict(manifest)


def listing(folder: Path) -> dict[str, int]:
    """Every file of a folder with its size in bytes, without hidden ones."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files if not path.name.startswith(".")}


def damage(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """Why a finished stage can no longer be used (a file gone or of another size), or None."""
    for name, size in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    return None


def commit() -> str | None:
    """The commit of the source tree this package runs from, with "+" if files were changed; None outside git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """What a reader of times must know: system, processor, cores, memory in bytes, versions."""
    versions = {}
    for name in ("torch", "numpy", "whimbrel"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = (
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        )
        processor = next(names, processor)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.platform(terse=True),
        "processor": processor,
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": versions,
    }
