"""Several ranks compute what one computes: each axis alone, and axes together, with unequal numbers of targets."""

from __future__ import annotations

import json
from typing import Any

import pytest
from equal import CASES, TOLERANCE
from small import launch

NAMES = {ranks: [f"{net} {axes}" for axes in cases for net in ("hybrid", "classic")] for ranks, cases in CASES.items()}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("equal") / f"{request.param}.json"
    launch("equal.py", request.param, out)
    found = json.loads(out.read_text())
    taught = {name: found.pop(name) for name in sorted(found) if name.startswith("taught")}
    assert sorted(found) == sorted(NAMES[request.param]) and len(taught) == (4 if request.param == 2 else 0)
    for name, seen in taught.items():  # a teacher that is whole everywhere, and all logits
        assert seen["loss"] < 1e-6 and seen["gradient"][0] < 1e-6 and seen["logits"] < 2e-6, (name, seen)
    return found


def test_loss_gradients_and_their_norm_are_those_of_one_rank(results: dict[str, Any]) -> None:
    """1e-6 absolute and relative in float32, with eight micro-batches of 5 to 136 tokens."""
    for name, seen in results.items():
        assert seen["same"], f"{name}: a parameter has no gradient"
        assert seen["loss"] < 1e-6, name
        assert seen["gradient"][0] < 1e-6, (name, seen["gradient"])
        assert seen["norm"] < 1e-6, name


def test_two_clipped_steps_end_in_the_same_weights(results: dict[str, Any]) -> None:
    """1e-5, a hundredth of a step of 1e-3, for all but those entries that float32's own rounding can move further: at
    most one of a thousand. The moments, which are not divided by anything, are equal for all of them.
    """
    for name, seen in results.items():
        assert seen["weights"][0] < TOLERANCE, (name, seen["weights"])
        assert seen["left_out"] < 1e-3, (name, seen["left_out"])
        assert seen["exp_avg"][0] < 1e-7 and seen["exp_avg_sq"][0] < 1e-7, (name, seen)


def test_a_rank_holds_what_was_planned(results: dict[str, Any]) -> None:
    for name, seen in results.items():
        assert seen["held"][0] == seen["held"][1], name
