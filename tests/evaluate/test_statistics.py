"""Shares, intervals, pass@k, majorities and comparisons, against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from whimbrel.evaluate.statistics import Z, falls, majority, mcnemar, mean, paired, pass_at, share


def wilson(p: float, n: float) -> tuple[float, float]:
    middle, spread = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return (middle - spread) / (1 + Z**2 / n), (middle + spread) / (1 + Z**2 / n)


def test_eight_of_ten() -> None:
    """Wilson's interval for 8 of 10 as printed in tables: 0.490 to 0.943."""
    found = share([[1.0]] * 8 + [[0.0]] * 2)
    assert found == pytest.approx({"mean": 0.8, "low": 0.4902, "high": 0.9433}, abs=5e-5)


def test_ten_copies_of_an_answer_count_once() -> None:
    once = share([[1.0]] * 8 + [[0.0]] * 2)
    assert share([[1.0] * 10] * 8 + [[0.0] * 10] * 2) == pytest.approx(once)
    assert share([[1.0] * 10] * 20)["low"] == pytest.approx(20 / (20 + Z**2))  # all right: 20 problems, not 200


def test_clusters_by_hand() -> None:
    """Sums 2 0 1 2 of 8, mean 5/8: squared distances 2.75, variance 2.75/64, so 5.4545 effective values."""
    found = share([[1, 1], [0, 0], [1, 0], [1, 1]])
    assert found["mean"] == 5 / 8
    assert (found["low"], found["high"]) == pytest.approx(wilson(5 / 8, (15 / 64) / (2.75 / 64)))


def test_never_more_than_the_values_nor_less_than_clusters_that_are_all_alike() -> None:
    even = share([[1, 0]] * 10)  # no spread between clusters at all
    assert (even["low"], even["high"]) == pytest.approx(wilson(0.5, 20))
    spread = share([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
    assert (spread["low"], spread["high"]) == pytest.approx(wilson(5 / 16, 16))
    uneven = share([[1.0] * 9, [0.0]])  # distances of sums ±0.9, so 0.09 / (1.62 / 100) effective values
    assert (uneven["low"], uneven["high"]) == pytest.approx(wilson(0.9, 9 / 1.62))
    assert share([[1.0] * 9, [1.0]])["low"] == pytest.approx(wilson(1.0, 100 / 82)[0])


def test_intervals_hold_the_truth_when_questions_are_drawn() -> None:
    """30 questions of different difficulty, 8 runs each: 95 % intervals by question hold the mean in 90 to 99 % of
    draws; those that take the 240 answers for independent do so in less than 85 %.
    """
    draw = np.random.default_rng(0)
    hits, naive = 0, 0
    for _ in range(600):
        hard = draw.beta(0.7, 0.3, 30)  # mean 0.7
        answers = (draw.random((30, 8)) < hard[:, None]).astype(float)
        found = share(answers.tolist())
        hits += found["low"] <= 0.7 <= found["high"]
        low, high = wilson(answers.mean(), answers.size)
        naive += low <= 0.7 <= high
    assert 0.90 <= hits / 600 <= 0.99
    assert naive / 600 < 0.85


def test_a_mean_of_any_values() -> None:
    """Means 1.5 and 4 of clusters of 2 and 2: mean 2.75, distances of sums ±2.5, so a variance of 12.5/16 · 2/1."""
    found = mean([[1.0, 2.0], [3.0, 5.0]])
    assert found["mean"] == 2.75
    assert found["high"] - 2.75 == pytest.approx(Z * math.sqrt(12.5 / 16 * 2))
    assert mean([[1.0, 2.0]]) == {"mean": 1.5}


@pytest.mark.parametrize(
    ("right", "of", "k", "expected"),
    [(1, 4, 2, 0.5), (2, 4, 2, 5 / 6), (0, 4, 4, 0.0), (4, 4, 1, 1.0), (3, 8, 1, 3 / 8), (1, 8, 8, 1.0)],
)
def test_pass_at_k(right: int, of: int, k: int, expected: float) -> None:
    assert pass_at(right, of, k) == pytest.approx(expected)


def test_majorities() -> None:
    assert majority(["7", "7", "8"], [1, 1, 0]) == 1.0
    assert majority(["8", "7", "8"], [0, 1, 0]) == 0.0
    assert majority(["7", "8", None, None, None], [1, 0, 0, 0, 0]) == 0.5
    assert majority(["7", "8", "9", "7", "8"], [1, 0, 0, 1, 0]) == 0.5
    assert majority([None, None], [0, 0]) == 0.0


def test_mcnemar_by_hand() -> None:
    """8 better and 2 worse: 2 (1 + 10 + 45) / 1024."""
    assert mcnemar(8, 2) == 0.109375
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    found = paired([0.0] * 8 + [1.0] * 12, [1.0] * 8 + [0.0] * 2 + [1.0] * 10)
    assert (found["difference"], found["better"], found["worse"], found["pairs"]) == (0.3, 8, 2, 20)
    assert found["p"] == 0.109375
    assert found["low"] == pytest.approx(0.3 - Z * math.sqrt((0.5 - 0.09) / 20), abs=0.05)
    assert found["high"] == pytest.approx(0.3 + Z * math.sqrt((0.5 - 0.09) / 20), abs=0.05)
    assert paired([1.0] * 3, [1.0] * 3) | {"p": 1.0} == paired([1.0] * 3, [1.0] * 3)


def test_means_of_several_samples_change_sides() -> None:
    """Three differences of 1/2: of the eight ways to change sides two are as far from 0."""
    found = paired([0.0, 0.25, 0.5], [0.5, 0.75, 1.0])
    assert found["test"] == "change of sides"
    assert found["p"] == pytest.approx(0.25, abs=0.02)
    assert found == paired([0.0, 0.25, 0.5], [0.5, 0.75, 1.0])


def test_falls_is_measured_between_the_ends_of_intervals() -> None:
    up = [{"low": 0.1, "high": 0.2}, {"low": 0.15, "high": 0.3}, {"low": 0.5, "high": 0.6}]
    assert falls(up) == pytest.approx(0.1 - 0.3)
    assert falls(up[::-1]) == pytest.approx(0.5 - 0.2)
