"""Claims are read, computed from what stages measured, and shown met or missed."""

from __future__ import annotations

import pytest

from whimbrel import config
from whimbrel.errors import UserError
from whimbrel.pipeline.claims import Claim, held

MADE = {
    "before": {
        "metrics": {"sums": {"off": {"accuracy": 0.25}}, "flag": "x"},
        "peak_memory_bytes": 100,
        "wall_seconds": 30.0,
    },
    "after": {
        "metrics": {"sums": {"think": {"accuracy": 0.75}}},
        "peak_memory_bytes": 2**30,
        "wall_seconds": 60.0,
    },
}


def claim(**said: object) -> Claim:
    return config.parse(Claim, {"say": "it helps"} | said)


@pytest.mark.parametrize(
    ("said", "figure", "met"),
    [
        ({"of": "after.sums.think.accuracy", "minus": "before.sums.off.accuracy", "least": 0.5}, 0.5, True),
        ({"of": "after.sums.think.accuracy", "minus": "before.sums.off.accuracy", "least": 0.51}, 0.5, False),
        ({"of": "after.sums.think.accuracy", "over": "before.sums.off.accuracy", "most": 3}, 3.0, True),
        ({"of": "before.peak_memory_bytes", "most": 99}, 100.0, False),
        ({"of": "before.sums.think.accuracy", "least": 0}, None, False),
        ({"of": "before.flag", "least": 0}, None, False),
        ({"of": "run.minutes", "most": 1.5}, 1.5, True),
        ({"of": "run.gibibytes", "most": 0.9}, 1.0, False),
    ],
)
def test_figures(said: dict[str, object], figure: float | None, met: bool) -> None:
    (found,) = held([claim(**said)], MADE)
    assert (found["figure"], found["met"]) == (figure, met)


def test_a_claim_has_one_bound() -> None:
    for said in ({}, {"least": 1, "most": 2}):
        with pytest.raises(UserError, match="either least or most"):
            claim(of="a.b", **said)
