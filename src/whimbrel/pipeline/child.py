"""Start the process of a stage, hear what it says, and say how it ended."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from whimbrel.errors import UserError
from whimbrel.pipeline.recipe import Node

_LOST = "one of its processes ended without a word, as when memory runs out"
SIOCGIFADDR = 0x8915
"""Linux's question for an interface's address (netdevice(7))."""
GRACE = 15.0
"""Seconds in which processes whose peers on another host are gone may end by themselves."""


class StageError(Exception):
    """A stage failed or died. The message is one line: stage, cause, log file."""


class Lost(StageError):
    """Processes here ended because others did; the cause is elsewhere."""


@dataclass(frozen=True)
class Seat:
    """This host's place among those that run a stage together, and where torchrun's parts meet."""

    nodes: int = 1
    rank: int = 0
    address: str = ""
    port: int = 0
    here: str = ""
    """The address of this host by which others are reached."""


@dataclass(frozen=True)
class Job:
    """What a worker is told. `lock` is the descriptor of the run's lock, which it keeps as long as it lives."""

    node: Node
    inputs: Mapping[str, Path]
    out: Path
    log: Path
    lock: int | None
    seat: Seat = Seat()

    @property
    def here(self) -> int:
        """Processes on this host."""
        return self.node.processes // self.seat.nodes

    def save(self, events: int | str) -> str:
        """Write the job for the worker to read; `events` is the descriptor, or the path of a pipe, it speaks into.
        Returns the path of the file.
        """
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


def attend(
    job: Job, hear: Callable[[dict[str, Any]], None], lost: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Run a job to its end; returns its last event. `hear` gets all others, and the log lines of what happens here.

    Once `lost` says that another host is no longer with it, what runs here has GRACE seconds to end. Raises UserError
    for a mistake that the stage names, StageError for anything else that ends it, KeyboardInterrupt when it was asked
    to stop, here or on another host.
    """
    job.log.parent.mkdir(exist_ok=True)
    with _channel(job) as (ear, mouth, events), open(job.log, "ab") as log, open(ear, encoding="utf-8") as lines:
        path = job.save(events)
        # A session of its own: the terminal's Ctrl-C reaches only the parent, which then asks the stage to stop.
        child = subprocess.Popen(
            [sys.executable, *_launcher(job), "-m", "whimbrel.pipeline.worker", path],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(mouth, *([] if job.lock is None else [job.lock])),
            start_new_session=True,
            env=_environment(job),
        )
        os.close(mouth)
        workers: list[int] = []  # leaders of their sessions, where there are several
        threading.Thread(target=_bury, args=(child, workers), daemon=True).start()
        threading.Thread(target=_end_with_others, args=(child, workers, lost), daemon=True).start()
        last: dict[str, Any] = {}
        try:
            with _handing_on(child, workers, hear) as presses:
                for line in lines:
                    event = json.loads(line)
                    if event.get("event") == "process":
                        workers.append(event["pid"])
                    elif event.get("event") in ("done", "error", "stopped"):
                        last = event if not last or _weightier(event, last) else last
                    else:
                        hear(event)
                child.wait()
        except BaseException:
            _signal([child.pid, *workers], signal.SIGKILL)
            raise
        finally:
            child.wait()
            os.unlink(path)
            if child.stdin is not None:
                child.stdin.close()
    if presses or last.get("event") == "stopped":  # or somebody asked for it on another host
        raise KeyboardInterrupt(last.get("text", ""))
    if child.returncode == 0 and (last.get("event") == "done" or job.seat.rank):
        return last
    if child.returncode == -signal.SIGKILL and lost():
        raise Lost(f"stage {job.node.name}: another host is gone (log: {job.log})")
    raise _cause(job, last, child.returncode)


def _weightier(event: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    """Of several last words: the cause, not what it caused on other processes."""
    return event.get("reason") != "peer" and last.get("reason", "peer") == "peer"


@contextmanager
def _channel(job: Job) -> Iterator[tuple[int, int, int | str]]:
    """A pipe: its two ends, and how workers find the second. Those that torchrun starts inherit nothing but know a
    path.
    """
    if job.node.processes == 1:
        ear, mouth = os.pipe()
        yield ear, mouth, mouth
        return
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "events")
        os.mkfifo(path)
        ear = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        mouth = os.open(path, os.O_WRONLY)  # torchrun keeps it open, so that lines end when all have ended
        os.set_blocking(ear, True)
        yield ear, mouth, path


def _launcher(job: Job) -> list[str]:
    """What stands between Python and the module: torchrun, on this machine or with others, for several processes."""
    if job.node.processes == 1:
        return []
    seat, words = job.seat, ["--standalone", "--local-addr", "127.0.0.1"]
    if seat.nodes > 1:
        words = ["--nnodes", str(seat.nodes), "--node-rank", str(seat.rank), "--rdzv-backend", "static"]
        words += ["--rdzv-endpoint", f"{seat.address}:{seat.port}", "--rdzv-id", job.node.name]
    return ["-m", "torch.distributed.run", *words, "--nproc-per-node", str(job.here)]


def _environment(job: Job) -> dict[str, str]:
    """Several processes share the cores, and those of several hosts talk where the hosts do, unless somebody has said
    otherwise: gloo by itself takes what the host's own name stands for, often 127.0.1.1.
    """
    if job.node.processes == 1:
        return dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = _interface(job.seat.here) if job.seat.nodes > 1 else ""
    talk = {"GLOO_SOCKET_IFNAME": name} if name else {}
    return {"OMP_NUM_THREADS": str(max(1, cores // job.here)), **talk, **os.environ}


def _interface(address: str) -> str:
    """The network interface whose first address this is; empty where Linux does not say."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex() if sys.platform == "linux" else ():
            with suppress(OSError):  # one without an address
                answer = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


@contextmanager
def _handing_on(
    child: subprocess.Popen[bytes], workers: list[int], hear: Callable[[dict[str, Any]], None]
) -> Iterator[list[int]]:
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
        if len(presses) < len(words):
            _signal(workers or [child.pid], signal.SIGINT)  # not torchrun too: it would not let them finish
        else:
            _signal([child.pid, *workers], signal.SIGKILL)

    before = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield presses
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal(leaders: Sequence[int], number: int) -> None:
    """Send a signal to the processes of a stage and what they have started."""
    for leader in leaders:
        with suppress(ProcessLookupError):
            os.killpg(leader, number)


def _bury(child: subprocess.Popen[bytes], workers: Sequence[int]) -> None:
    """When a stage has ended, end what it has started: a helper that outlives it keeps its pipe and the lock open."""
    child.wait()
    _signal([child.pid, *workers], signal.SIGKILL)


def _end_with_others(child: subprocess.Popen[bytes], workers: Sequence[int], lost: Callable[[], bool]) -> None:
    """End what runs here if it has not ended GRACE seconds after another host was lost: NCCL would wait for minutes."""
    since = None
    while child.poll() is None:
        since = since or (time.monotonic() if lost() else None)
        if since is not None and time.monotonic() - since > GRACE:
            _signal([child.pid, *workers], signal.SIGKILL)
        time.sleep(0.2)


def _cause(job: Job, last: Mapping[str, Any], code: int) -> Exception:
    """One line for the way in which a stage ended."""
    name, log, seat = job.node.name, job.log, job.seat
    if last.get("event") == "error" and last["user"]:
        return UserError(f"stage {name}: {last['text']}")
    name += f" on host {seat.rank} ({socket.gethostname()})" if seat.nodes > 1 else ""
    if last.get("event") == "error":
        if last["reason"] == "disk":
            return UserError(f"stage {name}: no space left for {job.out}; free some, then the same command goes on")
        if last["reason"] == "peer":
            return Lost(f"stage {name}: {_LOST} (log: {log}); the same command goes on from its last save")
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
    if job.node.processes > 1 and not last:
        return StageError(f"stage {name}: {_LOST} (log: {log}); the same command goes on from its last save")
    return StageError(
        f"stage {name} ended with status {code} and said nothing (log: {log}); the same command tries again"
    )
