"""Start the process of a stage, hear what it says, and say how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from whimbrel.errors import UserError
from whimbrel.pipeline.recipe import Node


class StageError(Exception):
    """A stage failed or died. The message is one line: stage, cause, log file."""


@dataclass(frozen=True)
class Job:
    """What a worker is told. `lock` is the descriptor of the run's lock, which it keeps as long as it lives."""

    node: Node
    inputs: Mapping[str, Path]
    out: Path
    log: Path
    lock: int

    def save(self, events: int) -> str:
        """Write the job for the worker to read; returns the path of the file."""
        job = {
            "name": f"stages.{self.node.name}.config",
            "settings": self.node.stage.settings,
            "run": self.node.stage.run,
            "config": self.node.resolved,
            "inputs": {name: str(path) for name, path in self.inputs.items()},
            "out": str(self.out),
            "model": self.node.stage.model,
            "events": events,
        }
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(job, file)
        return file.name


def attend(job: Job, hear: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run a job to its end; returns its last event. `hear` gets all others, and the log lines of what happens here.

    Raises UserError for a mistake that the stage names, StageError for anything else that ends it, KeyboardInterrupt
    when it was asked to stop.
    """
    job.log.parent.mkdir(exist_ok=True)
    ear, mouth = os.pipe()
    path = job.save(mouth)
    with open(job.log, "ab") as log, open(ear, encoding="utf-8") as lines:
        # A session of its own: the terminal's Ctrl-C reaches only the parent, which then asks the stage to stop.
        child = subprocess.Popen(
            [sys.executable, "-m", "whimbrel.pipeline.worker", path],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(mouth, job.lock),
            start_new_session=True,
        )
        os.close(mouth)
        threading.Thread(target=_bury, args=(child,), daemon=True).start()
        last: dict[str, Any] = {}
        try:
            with _handing_on(child, hear) as presses:
                for line in lines:
                    event = json.loads(line)
                    if event.get("event") in ("done", "error", "stopped"):
                        last = event
                    else:
                        hear(event)
                child.wait()
        except BaseException:
            _signal(child, signal.SIGKILL)
            raise
        finally:
            child.wait()
            os.unlink(path)
            if child.stdin is not None:
                child.stdin.close()
    if presses:
        raise KeyboardInterrupt(last.get("text", ""))
    if last.get("event") == "done" and child.returncode == 0:
        return last
    raise _cause(job, last, child.returncode)


@contextmanager
def _handing_on(child: subprocess.Popen[bytes], hear: Callable[[dict[str, Any]], None]) -> Iterator[list[int]]:
    """Inside, Ctrl-C and SIGTERM ask the stage to stop at its next safe point; a second one does not wait for that, a
    third one ends it. Yields the signals so far."""
    presses: list[int] = []
    words = (
        "stopping at the next safe point (again: stop where it is)",
        "stopping where it is (again: end it)",
        "ending it",
    )

    def press(number: int, frame: FrameType | None) -> None:
        presses.append(number)
        if len(presses) <= len(words):
            hear({"event": "log", "text": words[len(presses) - 1]})
        _signal(child, signal.SIGINT if len(presses) < len(words) else signal.SIGKILL)

    before = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield presses
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a stage and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _bury(child: subprocess.Popen[bytes]) -> None:
    """When a stage has ended, end what it has started: a helper that outlives it keeps its pipe and the lock open."""
    child.wait()
    _signal(child, signal.SIGKILL)


def _cause(job: Job, last: Mapping[str, Any], code: int) -> Exception:
    """One line for the way in which a stage ended."""
    name, log = job.node.name, job.log
    if last.get("event") == "error":
        if last["user"]:
            return UserError(f"stage {name}: {last['text']}")
        if last["reason"] == "disk":
            return UserError(f"stage {name}: no space left for {job.out}; free some, then the same command goes on")
        if last["reason"] == "memory":
            return UserError(f"stage {name} ran out of memory; make its batches or its model smaller (details: {log})")
        return StageError(
            f"stage {name} failed: {last['text']} (where: the end of {log}); the same command tries again"
        )
    if code < 0:
        try:
            how = signal.Signals(-code).name
        except ValueError:
            how = f"signal {-code}"
        why = ", as the system does when memory runs out" if how == "SIGKILL" else ""
        return StageError(
            f"stage {name} was killed by {how}{why} (log: {log}); the same command goes on from its last save"
        )
    return StageError(
        f"stage {name} ended with status {code} and said nothing (log: {log}); the same command tries again"
    )
