"""The learning rate by step."""

from __future__ import annotations

import math

import pytest

from whimbrel.errors import UserError
from whimbrel.train.schedule import ScheduleSettings


def shares(settings: ScheduleSettings, steps: int) -> list[float]:
    return [settings.share(step, steps) for step in range(steps)]


def test_wsd_warms_up_stays_and_decays_to_its_floor() -> None:
    settings = ScheduleSettings(warmup_steps=4, decay_share=0.25, decay_shape="linear", floor=0.2)
    expected = [0.25, 0.5, 0.75, 1.0] + [1.0] * 11 + [0.84, 0.68, 0.52, 0.36, 0.2]
    assert shares(settings, 20) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("cosine", 0.5), ("1-sqrt", 1 - math.sqrt(0.5))])
def test_shapes_of_the_decay(shape: str, half: float) -> None:
    values = shares(ScheduleSettings(decay_share=1.0, decay_shape=shape, floor=0.0), 8)
    assert values[3] == pytest.approx(half, abs=1e-12)
    assert values[7] == pytest.approx(0.0, abs=1e-12)
    assert values == sorted(values, reverse=True)


def test_a_linear_and_a_cosine_decay_differ_away_from_the_middle() -> None:
    linear, cosine = (
        shares(ScheduleSettings(decay_share=1.0, decay_shape=shape), 8)[1] for shape in ("linear", "cosine")
    )
    assert cosine - linear > 0.05


def test_cosine_runs_from_the_end_of_the_warm_up_to_the_end() -> None:
    values = shares(ScheduleSettings(kind="cosine", warmup_steps=2, decay_share=0.0, floor=0.1), 10)
    assert values[:2] == [0.5, 1.0]
    assert values[5] == pytest.approx(0.1 + 0.9 * 0.5, abs=1e-12)
    assert values[9] == pytest.approx(0.1, abs=1e-12)


def test_no_decay_stays_at_the_peak() -> None:
    assert shares(ScheduleSettings(decay_share=0.0), 5) == [1.0] * 5


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"kind": "wds"}, "'wsd'"),
        ({"decay_shape": "cosin"}, "'cosine'"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"floor": 1.5}, "floor"),
        ({"decay_share": -0.1}, "decay_share"),
    ],
)
def test_mistakes_are_named(wrong: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        ScheduleSettings(**wrong)  # type: ignore[arg-type]


def test_a_warm_up_that_does_not_fit_says_what_would() -> None:
    with pytest.raises(UserError, match="warmup_steps to 80 or less"):
        ScheduleSettings(warmup_steps=81, decay_share=0.2).check(100)
