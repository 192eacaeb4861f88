"""Time several ways to do one thing, in turns, in one process: what every file in this folder uses.

Turns (A B A B …) let drifts of a shared machine fall on all sides alike. Quote medians and the ratio of medians.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def in_turns(ways: Mapping[str, Callable[[], Any]], repeats: int = 5, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each run of each way: `warm_up` uncounted rounds, then `repeats` rounds of all ways in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warm_up + repeats):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, least and most of one way's runs, in seconds."""
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def machine() -> dict[str, Any]:
    """What a reader needs to place a figure: processor, threads, torch, date, commit."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    )
    return {
        "date": date.today().isoformat(),
        "commit": commit + ("+changes" if changed.stdout.strip() else ""),
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def record_row(name: str, row: str, result: Mapping[str, Any]) -> None:
    """Keep one row of results/NAME.json. Rows may be of several days: each says when and where it was measured."""
    path = RESULTS / f"{name}.json"
    whole = json.loads(path.read_text()) if path.exists() else {"benchmark": name, "rows": {}}
    whole["rows"][row] = {**result, "machine": machine()}
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(whole, indent=2) + "\n")


def record(name: str, result: Mapping[str, Any]) -> None:
    """Print the result and keep it as results/NAME.json."""
    whole = {"benchmark": name, "machine": machine(), **result}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps(whole, indent=2))
