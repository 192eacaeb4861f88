"""Tests of the pipeline start processes; these find the short stages through PYTHONPATH."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
SOURCE = str(Path(__file__).parents[2] / "src")
sys.path.insert(0, HERE)


@pytest.fixture(autouse=True)
def stages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    known = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [HERE, SOURCE, known])))
