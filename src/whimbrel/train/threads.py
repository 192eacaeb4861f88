"""How many threads: measured, because on shared cores two can be twenty times slower than one.

Every parallel region waits for its slowest thread; one that finds its core taken makes all of them wait. So before step
1 the loop times three steps with 1, 2, 4, ... threads and keeps the fastest. The number is part of the training state:
sums over threads round differently, and a resumed run must round as before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from whimbrel.events import Report
from whimbrel.parallel.mesh import ALONE, Share

TRIALS = 3


def candidates(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    powers = [2**k for k in range(most.bit_length()) if 2**k < most]
    return [*powers, most]


@contextmanager
def using(threads: int) -> Iterator[None]:
    """Inside, torch computes with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest(
    trial: Callable[[], object], choices: Sequence[int], clock: Callable[[], float] = time.perf_counter
) -> dict[int, float]:
    """Seconds of a trial with each number of threads: the mean of three after one to warm up."""
    seconds = {}
    for threads in choices:
        with using(threads):
            trial()
            start = clock()
            for _ in range(TRIALS):
                trial()
            seconds[threads] = (clock() - start) / TRIALS
    return seconds


def choose(asked: int, recorded: int | None, trial: Callable[[], object], report: Report, share: Share = ALONE) -> int:
    """The number of threads of a run: as asked; else as recorded in the checkpoint it continues; else the fastest.

    `trial` must have no side effects. Threads beyond torch's present setting (OMP_NUM_THREADS) are not tried. Several
    ranks try together, and take the number that is fastest for all of them.
    """
    if asked:
        if recorded not in (None, asked):
            report(
                {
                    "event": "warning",
                    "text": f"threads is {asked}, the run began with {recorded}; it will not go on bit for bit",
                }
            )
        return asked
    if recorded is not None:
        return recorded
    choices = candidates(torch.get_num_threads())
    if len(choices) == 1:
        return choices[0]
    told = share.total({str(n): seconds for n, seconds in fastest(trial, choices).items()}, tuple(share.place))
    seconds = {int(n): total / share.axes.processes for n, total in told.items()}
    best = min(seconds, key=lambda threads: seconds[threads])
    figures = ", ".join(f"{threads}: {1000 * s:.0f} ms" for threads, s in seconds.items())
    report({"event": "log", "text": f"a step by number of threads: {figures}; using {best}"})
    return best
