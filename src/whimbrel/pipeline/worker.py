"""The process of one stage: `python -m whimbrel.pipeline.worker JOB.json`, started by `run`.

Events leave as JSON lines through the descriptor that the job names; what the stage prints goes to its log. Standard
input is a pipe that nobody writes to: when it ends, the parent is gone, and so is this process.

SIGINT asks for a stop: the next event, which a loop sends between two steps, raises KeyboardInterrupt there. A second
SIGINT does not wait for it.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from whimbrel import config
from whimbrel.errors import UserError
from whimbrel.events import silent
from whimbrel.pipeline import manifest, probe
from whimbrel.pipeline.stages import locate

FAILED, STOPPED = 1, 130


class Wire:
    """The report of a stage: one JSON line an event, in one write each, so that a killed process sends whole lines."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.stop = False
        self.lock = threading.Lock()

    def send(self, event: Mapping[str, Any]) -> None:
        """Write an event; a parent that is gone ends this process."""
        line = json.dumps(event, default=_plain) + "\n"
        try:
            with self.lock:
                os.write(self.descriptor, line.encode())
        except BrokenPipeError:
            os.killpg(os.getpid(), signal.SIGKILL)

    def report(self, event: dict[str, Any]) -> None:
        """What the stage calls. Log lines and warnings go to the log as well."""
        if event.get("event") in ("log", "warning"):
            print(f"{event['event']}: {event.get('text', '')}", flush=True)
        self.send(event)
        if self.stop:
            raise KeyboardInterrupt

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT: first a wish, then an order."""
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as plain ones, everything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def leave_with_parent() -> None:
    """End this process, and the helpers it has started, when standard input ends."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def peak_memory() -> int:
    """Largest resident memory of this process or of one of its children, in bytes.

    Linux hands ru_maxrss on through exec, so that a small stage would show its parent's size: VmHWM starts anew.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    status = Path("/proc/self/status")
    if status.exists():
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        own = int(peaks[0]) * 1024 if peaks else own
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit)


def work(job: Mapping[str, Any], wire: Wire, first: bool = True) -> dict[str, Any]:
    """Check the inputs, run the stage, probe the model it made; returns the last event. Of several processes the
    first one checks and reports.
    """
    inputs = {name: Path(path) for name, path in job["inputs"].items()}
    for folder in inputs.values() if first else ():
        made = manifest.read(folder) if folder.is_dir() else None
        if made and made.get("probe"):
            probe.check(folder / made["model"], made["probe"])
    settings = config.parse(locate(job["settings"]), job["config"], job["name"])
    out = Path(job["out"])
    metrics = locate(job["run"])(settings, inputs, out, wire.report if first else silent)
    seen = probe.take(out / job["model"]) if job["model"] and first else None
    return {"event": "done", "metrics": metrics, "probe": seen, "peak_memory_bytes": peak_memory()}


def main(path: str) -> int:
    """Run the job of a file; the exit status says how it ended, the last event why."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    rank = int(os.environ["RANK"]) if isinstance(job["events"], str) else 0  # torchrun says it
    wire = Wire(os.open(job["events"], os.O_WRONLY) if isinstance(job["events"], str) else job["events"])
    leave_with_parent()
    signal.signal(signal.SIGINT, wire.interrupt)
    if isinstance(job["events"], str):
        wire.send({"event": "process", "pid": os.getpid()})
    try:
        if isinstance(job["events"], str):
            locate("whimbrel.parallel.mesh:join")()  # before anything is put on a device: it says which one
        done = work(job, wire, rank == 0)
        if rank == 0:
            wire.send(done)
        return 0
    except KeyboardInterrupt as stop:
        if rank:
            return 0 if str(stop) else STOPPED  # stopped together at a safe point; the first process says so
        wire.send({"event": "stopped", "text": str(stop)})
        return STOPPED
    except UserError as error:
        wire.send({"event": "error", "text": str(error), "user": True, "reason": "user"})
    except Exception as error:
        traceback.print_exc()
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        memory = (
            isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)
        )
        lost = "gloo/transport" in str(error) or type(error).__name__ in ("DistBackendError", "DistNetworkError")
        reason = "disk" if full else "memory" if memory else "peer" if lost else "error"
        wire.send({"event": "error", "text": f"{type(error).__name__}: {error}", "user": False, "reason": reason})
    return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
