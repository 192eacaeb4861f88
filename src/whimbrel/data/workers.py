"""Call a function on each item in processes of their own: a call that does not return in time is killed and marked.

The deadline is an alarm of the kernel. It also ends a process that is stuck in C code, or whose parent is gone. It
counts seconds of the processor, so that a machine that is busy or asleep changes no result; a call that waits for
something that never comes ends after PATIENCE times as many seconds on the clock.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
PATIENCE = 30


@dataclass(frozen=True)
class Lost:
    """A call without a result: reason "timeout", "crashed" (its process ended, as when out of memory) or "failed"."""

    reason: str
    detail: str = ""


class _Worker:
    """One process with one call at a time."""

    def __init__(self, function: Callable[[Any], Any], deadline: float, memory: int) -> None:
        self.function, self.deadline, self.memory = function, deadline, memory
        self.index: int | None = None
        self._start()

    def _start(self) -> None:
        # Spawned and not forked: a fork of a process with threads can stop dead in a lock that nobody holds any more.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (self.function, theirs, self.deadline, self.memory)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def give(self, index: int, item: Any) -> None:
        self.index = index
        self.pipe.send(item)

    def take(self) -> Any:
        """The result of the call; a process that has ended is replaced."""
        self.index = None
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            late = self.process.exitcode in (-signal.SIGPROF, -signal.SIGALRM)
            self.pipe.close()
            self._start()
            return Lost("timeout", f"{self.deadline:g} s") if late else Lost("crashed")

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(function: Callable[[Any], Any], pipe: Connection, deadline: float, memory: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    while True:
        try:
            item = pipe.recv()
        except EOFError:  # the parent is gone
            return
        signal.setitimer(signal.ITIMER_PROF, deadline)
        signal.setitimer(signal.ITIMER_REAL, deadline * PATIENCE)
        try:
            result = function(item)
        except Exception as error:
            result = Lost("failed", f"{type(error).__name__}: {error}"[:200])
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(result)


def each(
    function: Callable[[Item], Any], items: Iterable[Item], *, workers: int, deadline: float, memory: int
) -> Iterator[tuple[Item, Any]]:
    """Yield (item, function(item) or Lost) in the order of the items, whatever the number of workers.

    function: importable by its name, as are the items' types. deadline: CPU seconds a call. memory: bytes a process may
    address.
    """
    crew = [_Worker(function, deadline, memory) for _ in range(workers)]
    queue = enumerate(items)
    done: dict[int, tuple[Item, Any]] = {}
    given: dict[int, Item] = {}
    yielded = 0
    try:
        while True:
            for worker in crew:
                if worker.index is None and (entry := next(queue, None)) is not None:
                    given[entry[0]] = entry[1]
                    worker.give(*entry)
            busy = {worker.pipe: worker for worker in crew if worker.index is not None}
            if not busy:
                return
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]  # what comes back is what was waited for
                index = worker.index
                assert index is not None
                done[index] = given.pop(index), worker.take()
            while yielded in done:
                yield done.pop(yielded)
                yielded += 1
    finally:
        for worker in crew:
            worker.stop()
