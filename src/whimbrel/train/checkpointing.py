"""The training state on disk: whole or absent, checked before it is trusted, and enough to go on bit for bit.

    checkpoints/step-00000120/
        shard-*.safetensors    weights, AdamW's moments, torch's random state (torch.distributed.checkpoint)
        train_state.json       everything else, and the SHA-256 of every other file

It is local and trusted, a means to go on and never a release form: models are released as Hugging Face folders
(model/checkpoint.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from whimbrel.errors import UserError
from whimbrel.events import Report
from whimbrel.files import atomic_folder, atomic_write
from whimbrel.parallel.mesh import ALONE, Share
from whimbrel.parallel.pieces import Scattered, parts
from whimbrel.parallel.tensor import cuts
from whimbrel.train.measure import disk_errors

SCHEMA = 2
STATE = "train_state.json"
FILE_BYTES = 2**30
"""A file holds about this much: it passes through memory whole while it is written."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after `step` updates, besides its tensors."""

    step: int
    threads: int
    """Threads of the CPU; a resumed run takes the same."""
    identity: dict[str, Any]
    """Every setting that changes what is computed."""
    metrics_offset: int = 0
    """Length of the metrics file in bytes."""
    data: str = ""
    """Digest of the last batch, by which other data are noticed."""
    figures: dict[str, float] = field(default_factory=dict)
    """The last line of training figures."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file of the checkpoint."""
    schema: int = SCHEMA


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of the training state by name, as views: loading into them restores model and optimizer.

    A parameter that tensor parallel would cut into several segments is kept as those, NAME/SEGMENT, on any number of
    ranks: so a run goes on with another number. AdamW makes its moments in the first step; here they are made before,
    as the zeros they start from.
    """
    share: Share = getattr(model, "share", None) or ALONE
    config = getattr(model, "config", None)
    table = cuts(config) if config is not None else {}
    tensors: dict[str, Tensor] = {}

    def note(kind: str, name: str, key: str, tensor: Tensor) -> None:
        for part in parts(tensor, table.get(name), share):
            label = f"{kind}.{name}" + f"/{part.segment}" * bool(part.segment) + key
            tensors[label] = part.tensor if share.mesh is None else Scattered(part)

    for name, tensor in model.state_dict().items():
        note("model", name, "", tensor)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors[f"optimizer.{name}.step"] = state["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            note("optimizer", name, f".{key}", state[key])
    return tensors


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"step-{step:08d}"


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step, unchecked."""
    found = _listing(folder)
    return found[-1][1] if found else None


def save(folder: Path, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Write a checkpoint, from all ranks that share the model, then remove all but the newest `keep`.

    A full disk raises `UserError` and leaves the older ones.
    """
    share: Share = getattr(model, "share", None) or ALONE
    return _write(folder, state, _everything(model, optimizer), keep, share, None)


class Saver:
    """Writes checkpoints: at once, or (`asynchronous`) from a copy, while the next steps are computed."""

    def __init__(self, folder: Path, keep: int, share: Share, asynchronous: bool) -> None:
        self.folder, self.keep, self.share = folder, keep, share
        self.pool = ThreadPoolExecutor(1) if asynchronous else None
        self.pending: Future[Path] | None = None
        self.group = None
        if asynchronous and share.mesh is not None:  # the thread's messages must not meet those of the steps
            self.group = torch.distributed.new_group(backend="gloo")

    def save(self, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
        """`save`; what went wrong with the one before is raised here at the latest."""
        self.wait()
        tensors = _everything(model, optimizer)
        if self.pool is None:
            return _write(self.folder, state, tensors, self.keep, self.share, None)
        copies = {name: t.copied() if isinstance(t, Scattered) else t.detach().to("cpu", copy=True)
                  for name, t in tensors.items()}  # fmt: skip
        self.pending = self.pool.submit(_write, self.folder, state, copies, self.keep, self.share, self.group)
        return path_of(self.folder, state.step)

    def wait(self) -> None:
        """Until the last checkpoint is whole."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def close(self) -> None:
        """Wait, and let the thread go."""
        if self.pool is not None:
            try:
                self.wait()
            finally:
                self.pool.shutdown()


def _everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return training_tensors(model, optimizer) | {"rng.cpu": torch.get_rng_state()}


def _write(folder: Path, state: TrainState, tensors: dict[str, Tensor], keep: int, share: Share, group: Any) -> Path:
    path = path_of(folder, state.step)
    with disk_errors(f"the checkpoint {path}"), _together(path, share, group) as beside:
        writer = dcp.HuggingFaceStorageWriter(str(beside), _split(tensors), save_distributed=True)
        with _plain_errors():
            dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=share.mesh is None)
        if share.first:
            record = asdict(state) | {"files": {file.name: _digest(file) for file in sorted(beside.iterdir())}}
            with atomic_write(beside / STATE) as file:
                json.dump(record, file, indent=1)
    if share.first:
        for _, old in _listing(folder)[:-keep]:
            shutil.rmtree(old)
    return path


@contextmanager
def _together(path: Path, share: Share, group: Any) -> Iterator[Path]:
    """`atomic_folder`, made and named by the first rank, filled by all."""
    if share.mesh is None:
        with atomic_folder(path) as beside:
            yield beside
        return
    box: list[Any] = [None]
    with atomic_folder(path) if share.first else nullcontext() as beside:
        box[0] = beside
        torch.distributed.broadcast_object_list(box, src=0, group=group)
        yield box[0]
    torch.distributed.barrier(group=group)


def newest(folder: Path, report: Report) -> tuple[Path, TrainState] | None:
    """The newest checkpoint that is whole, None if there is none at all.

    A damaged one is reported and set aside as `….damaged`. If all are damaged it is a `UserError`: starting anew must
    be a decision.
    """
    for unfinished in folder.glob(".*.tmp"):
        shutil.rmtree(unfinished)  # a killed process has left it
    found = _listing(folder)
    for _, path in reversed(found):
        try:
            return path, _read(path)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, OSError) as error:
            aside = path.with_name(path.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            text = f"the checkpoint {path} is damaged ({error}); set aside as {aside.name}, trying the one before"
            report({"event": "warning", "text": text})
    if found:
        raise UserError(
            f"no checkpoint in {folder} is whole; remove {folder} to start anew, or bring back a copy of one"
        )
    return None


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors into model, optimizer and torch's random state."""
    tensors = _everything(model, optimizer)
    reader = dcp.HuggingFaceStorageReader(str(path))
    with _plain_errors(), torch.no_grad():
        dcp.load(dict(tensors), storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    torch.set_rng_state(tensors["rng.cpu"])


def refuse_changes(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `UserError` that names every setting with which the checkpoint was not made."""
    old, new = _flat(before), _flat(now)
    changed = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    if changed:
        listing = ", ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in changed)
        raise UserError(f"cannot go on from {path}: {listing}; set it back, or remove {path.parent} to start anew")


def _listing(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint, oldest first."""
    named = (
        (re.fullmatch(r"step-(\d{8,})", path.name), path) for path in (folder.iterdir() if folder.exists() else ())
    )
    return sorted((int(match[1]), path) for match, path in named if match)


def _read(path: Path) -> TrainState:
    """The state of a checkpoint; ValueError, KeyError, TypeError or OSError if any of it is not as it was written."""
    record = json.loads((path / STATE).read_text(encoding="utf-8"))
    if record["schema"] != SCHEMA:
        raise UserError(
            f"{path} has schema {record['schema']}, this version reads {SCHEMA}; remove {path.parent} to start anew"
        )
    for name, digest in record["files"].items():
        if _digest(path / name) != digest:
            raise ValueError(f"{name} is not as it was written")
    return TrainState(**record)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split(tensors: dict[str, Tensor]) -> dict[str, int]:
    """File number (from 1) of each tensor, so that no file grows far beyond FILE_BYTES."""
    before, places = 0, {}
    for name, tensor in tensors.items():
        places[name] = 1 + before // FILE_BYTES
        before += tensor.nbytes
    numbers = {old: new for new, old in enumerate(sorted(set(places.values())), start=1)}
    return {name: numbers[place] for name, place in places.items()}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names; what JSON would change (tuples) is changed."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Without a process group torch warns that it works in one process, and wraps every error, which even hides a
    full disk.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error
