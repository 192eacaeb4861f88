"""How fast a run is (tokens a second, model FLOPs utilisation) and where its figures are written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from whimbrel.errors import UserError
from whimbrel.events import Report
from whimbrel.model import count
from whimbrel.model.config import ModelConfig
from whimbrel.ops import machine
from whimbrel.parallel.mesh import ALONE, COPIES, Share


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn a disk that is full, or a quota or limit that is reached, into a `UserError` that says what is missing."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        reason = os.strerror(error.errno).lower()
        raise UserError(
            f"{what} could not be written: {reason}; free some space, then the same command goes on"
        ) from error


class Meter:
    """Tokens seen, time spent, and the speed of a step against the machine's measured peak."""

    def __init__(self, config: ModelConfig, device: torch.device, precision: str, tokens: int, seconds: float) -> None:
        self.config = config
        self.peak = machine.matmul_peak(device, getattr(torch, precision))
        """Operations a second of a large matrix product here."""
        self.tokens, self.seconds = tokens, seconds
        """Of the whole run, over all its sessions; time in steps only, not in validation or checkpoints."""

    def lap(self, batches: Sequence[Any], seconds: float, share: Share = ALONE) -> dict[str, float]:
        """Count a step over these batches (and those of the other copies) that took so long; returns its figures."""
        lengths = [length for batch in batches for length in batch.lengths]
        tokens = sum(lengths)
        flops = tokens * count.flops_per_token(self.config, count.mean_context(lengths), training=True)
        whole = share.total({"tokens": tokens, "flops": flops}, COPIES)
        self.tokens += int(whole["tokens"])
        self.seconds += seconds
        return {
            "tokens": self.tokens,
            "tokens_per_second": whole["tokens"] / seconds,
            "mfu": whole["flops"] / seconds / self.peak / share.axes.processes,
            "seconds": self.seconds,
        }


class MetricsFile:
    """One JSON line per record, written at once. On opening, everything behind `offset` is cut off."""

    def __init__(self, path: Path, offset: int) -> None:
        self.path = path
        self.lost = offset - path.stat().st_size if path.exists() else offset
        """Bytes that the checkpoint knows of and the file has no more; above 0 somebody removed lines."""
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the loop
        self.file.truncate(min(offset, self.file.seek(0, os.SEEK_END)))

    def write(self, record: dict[str, Any]) -> None:
        """Add a line."""
        with disk_errors(str(self.path)):
            line = json.dumps(record).encode() + b"\n"
            while line:
                line = line[self.file.write(line) :]

    def sync(self) -> int:
        """Flush to the disk; returns the length in bytes."""
        with disk_errors(str(self.path)):
            os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoard:
    """The numbers of each record as curves, if the package is installed. Points behind `step` are purged on resume."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    @staticmethod
    def installed() -> bool:
        """Whether the package is there."""
        return find_spec("tensorboard") is not None

    def write(self, record: dict[str, Any]) -> None:
        """Add a point to the curve of every number."""
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


class NoLog:
    """The log of a rank that does not keep one."""

    def write(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> int:
        """Nothing was written."""
        return 0

    def close(self) -> None:
        """Nothing."""


class Log:
    """Where the figures of a run go: `metrics.jsonl`, TensorBoard, and whoever listens."""

    def __init__(self, folder: Path, offset: int, step: int, tensorboard: bool, report: Report) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = MetricsFile(folder / "metrics.jsonl", offset)
        if self.file.lost > 0:
            text = f"{self.file.path} has lost {self.file.lost} bytes since the checkpoint; its curve has a gap"
            report({"event": "warning", "text": text})
        self.board = TensorBoard(folder / "tensorboard", step) if tensorboard and TensorBoard.installed() else None
        self.report = report

    def write(self, record: dict[str, Any]) -> None:
        """A record has `step` (updates done) and numbers."""
        self.file.write(record)
        if self.board is not None:
            self.board.write(record)
        self.report({"event": "metrics", **record})

    def sync(self) -> int:
        """Flush the metrics file to the disk; returns its length in bytes."""
        return self.file.sync()

    def close(self) -> None:
        """Flush and close."""
        self.file.close()
        if self.board is not None:
            self.board.close()
