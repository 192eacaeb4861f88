"""One thread a process: two tests at a time on two cores would otherwise wait for each other inside every operation.

Marks: a slow test that tests/slow.txt names is a proof, and `make test` (-m "not slow or proof") runs it all the same.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels then run in Python

torch.set_num_threads(1)
LIST = Path(__file__).parent / "slow.txt"


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the proofs."""
    named = {line for line in LIST.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")}
    for item in items:
        if item.nodeid.removeprefix("tests/").partition("[")[0] in named and item.get_closest_marker("slow"):
            item.add_marker("proof")
