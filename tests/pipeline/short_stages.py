"""Stages for tests: small, honest, and able to be killed at any moment."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whimbrel.config import Settings
from whimbrel.errors import UserError
from whimbrel.events import Report
from whimbrel.files import atomic_write
from whimbrel.pipeline.stages import Stage


class CountSettings(Settings):
    """Settings of `count`."""

    steps: int = 5
    pause: float = 0.0
    seed: int = 1
    trouble: str = ""


def count(settings: CountSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Mix numbers step by step, saving after each one, so that the sum shows every step left out or done twice."""
    state = {"step": 0, "total": settings.seed}
    saved = out / "state.json"
    if saved.exists():
        state = json.loads(saved.read_text())
    while state["step"] < settings.steps:
        state = {"step": state["step"] + 1, "total": (state["total"] * 31 + state["step"] + 1) % 1_000_003}
        with atomic_write(saved) as file:
            json.dump(state, file)
        report({"event": "progress", "done": state["step"], "total": settings.steps, "unit": "steps", "text": "sum"})
        time.sleep(settings.pause)
        if settings.trouble and state["step"] == 2:
            _make(settings.trouble)
    return {"total": state["total"], "steps": state["step"]}


def _make(trouble: str) -> None:
    if trouble == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == "disk":
        raise OSError(errno.ENOSPC, "No space left on device")
    if trouble == "memory":
        raise MemoryError("cannot allocate 1 TiB")
    if trouble == "user":
        raise UserError("steps is 2; set it to 3")
    if trouble == "helper":
        if os.fork() == 0:
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == "deaf":
        time.sleep(600)
    raise RuntimeError("the wheel came off")


class JoinSettings(Settings):
    """Settings of `join`; it needs one."""

    separator: str


def join(settings: JoinSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Write the names and sums of two inputs into one file."""
    left = json.loads((inputs["left"] / "state.json").read_text())
    right = inputs["right"].read_text() if inputs["right"].is_file() else (inputs["right"] / "state.json").read_text()
    (out / "deep").mkdir(exist_ok=True)
    (out / "deep" / "joined.txt").write_text(f"{left['total']}{settings.separator}{right}")
    report({"event": "warning", "text": "joined"})
    return {"length": len(right)}


HERE = "short_stages"
TABLE = {
    "count": Stage(
        settings=f"{HERE}:CountSettings",
        run=f"{HERE}:count",
        version=1,
        inputs=(),
        optional=("start",),
        several=("start",),
    ),
    "join": Stage(settings=f"{HERE}:JoinSettings", run=f"{HERE}:join", version=1, inputs=("left", "right")),
}
