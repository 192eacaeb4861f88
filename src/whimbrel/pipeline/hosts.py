"""One run on several hosts: the same command on each, over a folder that all of them see.

Host 0 leads. It alone holds the lock, decides what runs, keeps records and results. The others connect to it and run
their part of every stage that has several processes; torchrun joins the parts (static rendezvous, so that rank 0 is on
host 0). Between the hosts go JSON lines over TCP, and a line that ends is a host that is gone:

    host r:  {"host": r, "name", "recipe": digest}    host 0:  {"token": what FOLDER/.hosts holds}, or {"over": trouble}
             {"ended": trouble or null}                {"stage": name, "port": of its rendezvous}
                                                       {"over": trouble or null}

`trouble` is {"kind", "text"}. Nothing is encrypted and nobody is asked who he is, as with torchrun: a network of one's
own is assumed.
"""

from __future__ import annotations

import hashlib
import json
import queue
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whimbrel import __version__
from whimbrel.errors import UserError
from whimbrel.files import atomic_write
from whimbrel.pipeline.child import GRACE, Job, Lost, Seat, StageError, attend
from whimbrel.pipeline.console import Display
from whimbrel.pipeline.recipe import Node, Recipe

PORT = 29400
PATIENCE = 600.0
"""Seconds that hosts wait for each other at the start."""
SILENCE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6), ("TCP_USER_TIMEOUT", 40_000))
"""A host without power, or behind a cable that is cut, is gone after 40 s, whether something was said to it or not."""
TOKEN = ".hosts"
Trouble = dict[str, str]


@dataclass(frozen=True)
class Hosts:
    """How many hosts work on a run, which one this is, and where host 0 is met."""

    nodes: int = 1
    rank: int = 0
    address: str = ""
    port: int = PORT

    @classmethod
    def of(
        cls, nodes: int | None, rank: int | None, endpoint: str | None, environment: Mapping[str, str], wanted: int = 0
    ) -> Hosts:
        """From torchrun's words; without any of them from what `srun` says. `wanted` is what the recipe says (0: it
        says nothing), which `nodes` overrides. Raises UserError for what does not fit.
        """
        if nodes is None and rank is None and endpoint is None:
            try:
                found = cls._slurm(environment)
            except (KeyError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"what srun says cannot be read ({error}); set --nodes, --node-rank and --rdzv-endpoint"
                ) from None
            if wanted not in (0, found.nodes):
                started = f"srun started {found.nodes}" if found.nodes > 1 else "this host was started alone"
                raise UserError(
                    f"launch.nodes is {wanted}, but {started}; start it on {wanted} hosts, each with --node-rank and "
                    f"--rdzv-endpoint or all with srun, or set launch.nodes to {found.nodes}"
                )
            return found
        nodes = nodes or wanted or None if nodes is None else nodes
        if nodes is None or nodes < 1:
            raise UserError(f"--nodes is {nodes}; set --nodes to the number of hosts, 1 or more")
        if nodes == 1:
            return cls()
        if rank is None or not 0 <= rank < nodes:
            raise UserError(f"--node-rank is {rank}; set --node-rank from 0 to {nodes - 1}, another one on each host")
        address, _, port = (endpoint or "").rpartition(":") if ":" in (endpoint or "") else (endpoint or "", "", "")
        if not address or not (port or str(PORT)).isdecimal() or not 0 < int(port or PORT) < 1 << 16:
            raise UserError(
                f"--rdzv-endpoint is {endpoint}; set it to the name of host 0 and a port, for example node1:{PORT}"
            )
        return cls(nodes, rank, address, int(port or PORT))

    @classmethod
    def _slurm(cls, environment: Mapping[str, str]) -> Hosts:
        nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
        if nodes == 1:
            return cls()
        if (tasks := int(environment.get("SLURM_STEP_NUM_TASKS", nodes))) != nodes:
            raise UserError(
                f"srun started {tasks} tasks on {nodes} hosts; set --ntasks-per-node to 1, the stages start the others"
            )
        first = re.match(r"([^\[,]*)(?:\[([^],-]+)[^]]*\]([^,\[]*))?", environment["SLURM_STEP_NODELIST"])
        address = "".join(part or "" for part in first.groups()) if first else ""
        endpoint = f"{address}:{environment.get('MASTER_PORT', PORT)}"
        return cls.of(nodes, int(environment["SLURM_NODEID"]), endpoint, {})

    def check(self, recipe: Recipe) -> None:
        """Raise `UserError` where the processes of a stage cannot be shared evenly."""
        for node in recipe.nodes:
            if node.processes > 1 and node.processes % self.nodes:
                works = -(-node.processes // self.nodes) * self.nodes
                raise UserError(
                    f"stages.{node.name}.config.train.parallel makes {node.processes} processes, which {self.nodes} "
                    f"hosts do not share evenly; set its axes to a product of {works}, or --nodes to 1"
                )


class Line:
    """A connection to another host: what it says is put into a queue, its end and its troubles are noticed at once."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.inbox, self.bad = connection, queue.Queue[dict[str, Any] | None](), threading.Event()
        self.here = str(connection.getsockname()[0])
        """The address of this host by which the other one is reached."""
        self.name = ""
        """What the other host calls itself."""
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in SILENCE:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with suppress(OSError, ValueError, TypeError), self.socket.makefile(encoding="utf-8") as lines:
            for line in lines:
                word = dict(json.loads(line))
                if word.get("ended") or "over" in word:
                    self.bad.set()
                self.inbox.put(word)
        self.bad.set()
        self.inbox.put(None)

    def say(self, word: Mapping[str, Any]) -> None:
        """Send a line; a host that is gone is noticed where something is expected of it."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(word).encode() + b"\n")

    def hear(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next line, None if the other host is gone, or has said nothing for so long."""
        try:
            word = self.inbox.get(timeout=seconds)
        except queue.Empty:
            return None
        if word is None:
            self.inbox.put(None)
        return word

    def close(self) -> None:
        """Hang up."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def digest(recipe: Recipe) -> str:
    """What hosts must have in common."""
    return hashlib.sha256(f"{__version__}\n{recipe.text()}".encode()).hexdigest()


def _trouble(error: BaseException) -> Trouble:
    kinds = {KeyboardInterrupt: "stop", UserError: "user", Lost: "lost"}
    kind = next((word for type_, word in kinds.items() if isinstance(error, type_)), "stage")
    return {"kind": kind, "text": str(error)}


def _error(trouble: Mapping[str, str]) -> BaseException:
    kinds: dict[str, Callable[[str], BaseException]] = {"stop": KeyboardInterrupt, "user": UserError, "lost": Lost}
    return kinds.get(trouble["kind"], StageError)(trouble["text"])


class Leader:
    """What host 0 has of the others."""

    def __init__(self, hosts: Hosts, others: Mapping[int, Line]) -> None:
        self.hosts, self.others = hosts, others

    def attend(self, job: Job, hear: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """`child.attend`, on all hosts where the stage has several processes. Of what went wrong the cause is raised,
        wherever it was, not what it caused on other hosts.
        """
        if job.node.processes == 1 or not self.others:
            return attend(job, hear)
        if gone := [host for host, line in self.others.items() if line.bad.is_set()]:
            raise self._gone(job, gone[0])
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        for line in self.others.values():
            line.say({"stage": job.node.name, "port": port})
        here = next(iter(self.others.values())).here
        seat = Seat(self.hosts.nodes, 0, self.hosts.address, port, here)
        last, found = dict[str, Any](), list[BaseException]()
        try:
            last = attend(
                replace(job, seat=seat), hear, lambda: any(line.bad.is_set() for line in self.others.values())
            )
        except (UserError, StageError, KeyboardInterrupt) as error:
            found.append(error)
        for host, line in self.others.items():
            word = line.hear(2 * GRACE)
            if word is None:
                found.append(self._gone(job, host))
            elif word["ended"]:
                found.append(_error(word["ended"]))
        if found:
            raise next((error for error in found if not isinstance(error, Lost)), found[0])
        return last

    def _gone(self, job: Job, host: int) -> StageError:
        what = f"stage {job.node.name}: host {host} ({self.others[host].name}) is gone"
        log = job.log.with_suffix(f".host{host}.log")
        return StageError(f"{what}; the same command on every host goes on from the last save (log: {log})")


@contextmanager
def leading(hosts: Hosts, recipe: Recipe, folder: Path, display: Display) -> Iterator[Leader]:
    """Meet the other hosts; tell them at the end how it ended. With one host nothing is opened."""
    if hosts.nodes == 1:
        yield Leader(hosts, {})
        return
    token, others = secrets.token_hex(8), dict[int, Line]()
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / TOKEN) as file:
        file.write(token)
    trouble: Trouble | None = {"kind": "stage", "text": "host 0 ended"}
    try:
        _gather(hosts, digest(recipe), token, others, display)
        yield Leader(hosts, others)
        trouble = None
    except BaseException as error:
        trouble = _trouble(error)
        raise
    finally:
        for line in others.values():
            line.say({"over": trouble})
            line.close()
        (folder / TOKEN).unlink(missing_ok=True)


def _gather(hosts: Hosts, recipe: str, token: str, others: dict[int, Line], display: Display) -> None:
    """Wait for every other host, refuse one that runs something else."""
    here = hosts.address if hosts.address.startswith("127.") or hosts.address == "localhost" else ""
    try:
        door = socket.create_server((here, hosts.port))
    except OSError as error:
        raise UserError(
            f"--rdzv-endpoint {hosts.address}:{hosts.port}: {error.strerror}; set another port, for example "
            f"{hosts.address}:{hosts.port + 1}"
        ) from None
    display.say(f"host 0 of {hosts.nodes}, waiting for the others at {hosts.address}:{hosts.port}")
    deadline = time.monotonic() + PATIENCE
    with door:
        door.settimeout(0.5)
        while missing := [n for n in range(1, hosts.nodes) if n not in others or others[n].bad.is_set()]:
            if time.monotonic() > deadline:
                raise UserError(
                    f"host {missing[0]} did not come within {PATIENCE:.0f} s; start the same command there, with "
                    f"--node-rank {missing[0]}"
                )
            with suppress(TimeoutError):
                line = Line(door.accept()[0])
                word = line.hear(10.0) or {}
                if not isinstance(word.get("host"), int) or "recipe" not in word:
                    line.close()  # a stranger
                    continue
                for gone in [host for host, other in others.items() if other.bad.is_set()]:
                    others.pop(gone).close()  # it may come again
                wrong = _wrong(word, hosts, recipe, others)
                if not wrong:
                    line.say({"token": token})
                    answer = line.hear(30.0)
                    wrong = "it went away" if answer is None else answer["ended"] and answer["ended"]["text"]
                if wrong:
                    line.say({"over": {"kind": "user", "text": wrong}})
                    line.close()
                    raise UserError(f"host {word['host']}: {wrong}")
                line.name = str(word.get("name", ""))
                others[word["host"]] = line


def _wrong(word: Mapping[str, Any], hosts: Hosts, recipe: str, others: Mapping[int, Line]) -> str:
    if word["host"] in others or not 0 < word["host"] < hosts.nodes:
        return f"--node-rank {word['host']} is taken or not below {hosts.nodes}; set another one on each host"
    if word["recipe"] != recipe:
        return "it has another recipe, other settings or another version; start the same command on every host"
    return ""


def follow(hosts: Hosts, recipe: Recipe, folder: Path, display: Display) -> None:
    """Work for host 0 until it says that the run is over; raises what ended it."""
    line = _call(hosts, recipe, folder, display)
    try:
        nodes = {node.name: node for node in recipe.nodes}
        own: BaseException | None = None
        while True:
            word = line.hear(None if own is None else 3 * GRACE)
            if own is not None and not isinstance(own, Lost):
                raise own
            if word is None:
                raise StageError(
                    f"host 0 ({hosts.address}) is gone; the same command on every host goes on from the last save"
                )
            if "over" in word:
                if word["over"]:
                    raise _error(word["over"])
                return
            own = _part(nodes[word["stage"]], word["port"], hosts, folder, line, display)
            line.say({"ended": own and _trouble(own)})
    finally:
        line.close()


def _part(node: Node, port: int, hosts: Hosts, folder: Path, line: Line, display: Display) -> BaseException | None:
    """Run this host's processes of a stage; returns what went wrong."""
    paths = {name: folder / source if isinstance(source, str) else source for name, source in node.inputs.items()}
    log = folder / "logs" / f"{node.name}.host{hosts.rank}.log"
    seat = Seat(hosts.nodes, hosts.rank, hosts.address, port, line.here)
    display.start(node.name)
    try:
        attend(Job(node, paths, folder / f"{node.name}.partial", log, None, seat), display.event, line.bad.is_set)
    except (UserError, StageError, KeyboardInterrupt) as error:
        return error
    finally:
        display.stop()
    display.say(f"{node.name}: the part of this host is done")
    return None


def _call(hosts: Hosts, recipe: Recipe, folder: Path, display: Display) -> Line:
    """Connect to host 0, which may come later, and see that both have the same in front of them."""
    display.say(f"host {hosts.rank} of {hosts.nodes}, calling host 0 at {hosts.address}:{hosts.port}")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            line = Line(socket.create_connection((hosts.address, hosts.port), 10.0))
            break
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, socket.gaierror):
                raise UserError(
                    f"--rdzv-endpoint {hosts.address}:{hosts.port}: no host 0 there ({error.strerror or error}); start "
                    "the same command on it, with --node-rank 0"
                ) from None
            time.sleep(0.5)
    line.say({"host": hosts.rank, "name": socket.gethostname(), "recipe": digest(recipe)})
    word = line.hear(PATIENCE) or {"over": {"kind": "user", "text": "host 0 went away; start it again on every host"}}
    if "over" in word:
        line.close()
        raise _error(word["over"])
    deadline = time.monotonic() + 10
    while not (folder / TOKEN).is_file() or (folder / TOKEN).read_text() != word["token"]:
        if time.monotonic() > deadline:
            text = f"{folder.absolute()} is not the folder that host 0 works in; set --out to one that all hosts see"
            line.say({"ended": {"kind": "user", "text": text}})
            line.hear(5.0)
            line.close()
            raise UserError(text)
        time.sleep(0.1)
    line.say({"ended": None})
    return line
