"""Kill a training run at random moments until it is through: `python killed_run.py FOLDER SEED KILLS`.

This process never trains. It loads torch once and forks a child for each attempt; the child trains in FOLDER and is
killed (SIGKILL) a random while after a random number of lines have appeared in its metrics file. Prints the number of
kills.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tiny_run import tiny_train

from whimbrel.ops import machine


def lines(folder: Path) -> int:
    """Lines in the metrics file."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def attempt(folder: Path, lethal: int | None, delay: float) -> bool:
    """Train in a child; kill it `delay` seconds after line number `lethal`. Returns whether it came to its end."""
    child = os.fork()
    if child == 0:
        tiny_train(folder, checkpoint_every=3)
        os._exit(0)
    while lethal is not None and lines(folder) < lethal:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.001)
    if lethal is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("training failed")
    return os.WIFEXITED(status)


def main(folder: Path, seed: int, kills: int) -> None:
    """Attempts until one comes to its end."""
    torch.set_num_threads(1)
    machine.matmul_peak()  # measured once here, and remembered in every child
    draw = random.Random(seed)
    done = 0
    while not attempt(folder, draw.randint(1, 15) if done < kills else None, draw.uniform(0, 0.03)):
        done += 1
    print(done)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
