"""One run at a time in a folder."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whimbrel.errors import UserError


@contextmanager
def locked(folder: Path, patience: float = 2.0) -> Iterator[int]:
    """Hold the lock of a run's folder; yields the descriptor, which a stage's process inherits.

    The kernel drops a `flock` when the last process that shares it is gone, so a killed run leaves nothing to clean
    up, and a stage that outlives its killed parent still keeps others out. `patience` is in seconds: what such a
    stage gets to notice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = path.read_text().strip() or "unknown"
                    raise UserError(
                        f"{folder} is in use by another run (process {holder}); wait for it, stop it with "
                        f"`kill -INT {holder}`, or choose another folder with --out"
                    ) from None
                time.sleep(0.05)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield handle
    finally:
        os.close(handle)
