"""Axes have round numbers, curves go through their points."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.pipeline import charts
from whimbrel.pipeline.console import Rate, duration, figure


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e7), most=st.integers(2, 9))
def test_ticks_are_round_few_and_inside(low: float, span: float, most: int) -> None:
    found = charts.ticks(low, low + span, most)
    assert len(found) <= most + 1
    slack = 1e-6 * (span + abs(low))
    assert all(low - slack <= value <= low + span + slack for value in found)
    if len(found) > 2:
        gaps = [b - a for a, b in itertools.pairwise(found)]
        assert max(gaps) - min(gaps) <= 1e-6 * max(abs(low), span)


def test_ticks_of_a_known_axis() -> None:
    assert charts.ticks(4.1, 8.4, 6) == [5, 6, 7, 8]
    assert charts.ticks(0, 1_228_800, 6) == [0, 250_000, 500_000, 750_000, 1_000_000]


def test_a_running_mean_keeps_length_and_mean() -> None:
    points = [(float(i), float(i % 4)) for i in range(40)]
    found = charts.smooth(points, 4)
    assert [x for x, _ in found] == [x for x, _ in points]
    assert found[10][1] == pytest.approx(sum(y for _, y in points[8:13]) / 5)


def test_a_held_out_point_stands_where_its_values_say() -> None:
    train = [(100.0 * i, 8.0 - 0.04 * i) for i in range(1, 101)]
    svg = charts.training(860, train, [(0.0, 8.3), (5000.0, 6.0)], [(x, 1e-3) for x, _ in train], 8.32)
    frame = re.findall(r'<circle class="held" cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert float(frame[0][0]) == charts.LEFT
    assert float(frame[1][0]) == pytest.approx((charts.LEFT + 860 - charts.RIGHT) / 2, abs=0.1)
    assert float(frame[0][1]) < float(frame[1][1])  # a higher loss stands higher
    labels = {
        float(y): float(value) for y, value in re.findall(r'y="([\d.]+)" class="label" text-anchor="end">(\d)<', svg)
    }
    six = next(y for y, value in labels.items() if value == 6)
    assert float(frame[1][1]) == pytest.approx(six - 4, abs=0.1)  # letters hang 4 pixels below their line


def test_words_for_numbers() -> None:
    assert [duration(s) for s in (0.26, 12.4, 59.4, 59.6, 187, 7510)] == [
        "0.3 s",
        "12 s",
        "59 s",
        "1:00 min",
        "3:07 min",
        "2:05 h",
    ]
    assert [figure(n) for n in (3104, 0.00031, 4.2134, 1_225_174)] == ["3,104", "0.00031", "4.213", "1.225M"]


def test_rate_forgets_the_past() -> None:
    rate = Rate(span=10)
    assert rate.add(0, 0.0) == 0.0
    for second in range(1, 11):
        assert rate.add(second, float(second)) == pytest.approx(1.0)
    for second in range(11, 40):
        last = rate.add(10 + 5 * (second - 10), float(second))
    assert last == pytest.approx(5.0)
    assert rate.add(3, 41.0) == 0.0  # a count that falls starts anew
