"""These tests, and the processes they start, find their small world beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model, a vocabulary and problems."""
    from small_world import build

    return build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def taught(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same with a model that answers in the right form, now and then rightly."""
    from small_world import teach

    return world | {"model": teach(world, tmp_path_factory.mktemp("taught"))}
