"""These tests start processes, which find their helpers where the tests find them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "align")]


@pytest.fixture(scope="session", autouse=True)
def stages_where_workers_find_them() -> None:
    """Processes that the pipeline starts import the stages of this folder."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
