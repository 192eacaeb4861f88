"""Shares with 95 % intervals, pass@k, majorities and paired comparisons. Numbers in, numbers out.

A cluster is what was drawn at random: a problem with all of its samples (and its translations). Intervals and tests
treat clusters as independent and what is inside one as it comes.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
DRAWS = 10_000

Figure = dict[str, float]
"""`mean`, and the ends `low` and `high` of its 95 % interval."""


def _moments(clusters: Sequence[Sequence[float]]) -> tuple[float, float, int]:
    """Mean over all values, variance of that mean from the spread between clusters, number of values."""
    sums = np.array([sum(values) for values in clusters], np.float64)
    sizes: NDArray[np.float64] = np.array([len(values) for values in clusters], np.float64)
    total = sizes.sum()
    mean = sums.sum() / total
    return float(mean), float(((sums - mean * sizes) ** 2).sum() / total**2), int(total)


def share(clusters: Sequence[Sequence[float]]) -> Figure:
    """The mean of values in [0, 1] with a Wilson interval on the effective number of values.

    That number is p(1 - p) over the variance of the mean between clusters (after Korn and Graubard 1998), at most the
    number of values, at least Kish's n² / Σ nᵢ² (each cluster's values all the same), which also holds where every
    value is. With one value each it is Wilson's own interval, and ten copies of a value count once.
    """
    mean, variance, total = _moments(clusters)
    least = total**2 / sum(len(values) ** 2 for values in clusters)
    size = min(max(mean * (1 - mean) / max(variance, 1e-12), least), total)
    spread = Z * math.sqrt(mean * (1 - mean) / size + Z**2 / (4 * size**2))
    middle, scale = mean + Z**2 / (2 * size), 1 + Z**2 / size
    return {"mean": mean, "low": max(0.0, (middle - spread) / scale), "high": min(1.0, (middle + spread) / scale)}


def mean(clusters: Sequence[Sequence[float]]) -> Figure:
    """The mean of any values with a normal interval from the spread between clusters; of one cluster without."""
    middle, variance, _ = _moments(clusters)
    if len(clusters) == 1:
        return {"mean": middle}
    spread = Z * math.sqrt(variance * len(clusters) / (len(clusters) - 1))
    return {"mean": middle, "low": middle - spread, "high": middle + spread}


def falls(figures: Sequence[Mapping[str, float]]) -> float:
    """How far a later figure lies below an earlier one: from the low end of the one to the high end of the other.

    The largest over all couples; 0 or less: they never fall, within their intervals.
    """
    couples = itertools.combinations(figures, 2)
    return max(earlier["low"] - later["high"] for earlier, later in couples)


def pass_at(right: int, of: int, k: int) -> float:
    """The chance that one of k samples drawn without replacement is right (Chen et al. 2021, arXiv 2107.03374)."""
    return 1.0 - math.comb(of - right, k) / math.comb(of, k)


def majority(extracted: Sequence[str | None], correct: Sequence[float]) -> float:
    """Is the most frequent answer right? Samples without an answer do not vote; a tie is drawn by lot (its mean)."""
    votes = Counter(answer for answer in extracted if answer is not None)
    winners = {
        answer: value
        for answer, value in zip(extracted, correct, strict=True)
        if answer is not None and votes[answer] == max(votes.values())
    }
    return sum(winners.values()) / max(len(winners), 1)


def paired(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Two runs on the same clusters, a mean each: the difference (after - before), its 95 % interval, a p-value.

    The interval is a bootstrap over clusters with a fixed seed. Where every mean is 0 or 1 the test is McNemar's, exact
    and two-sided; else clusters change sides at random (10,000 times, fixed seed).
    """
    apart = np.array(after, np.float64) - np.array(before, np.float64)
    draw, count = np.random.default_rng(0), len(apart)
    low, high = np.quantile([apart[draw.integers(0, count, count)].mean() for _ in range(DRAWS)], [0.025, 0.975])
    better, worse = int((apart > 0).sum()), int((apart < 0).sum())
    if np.isin([*before, *after], (0.0, 1.0)).all():
        p, test = mcnemar(better, worse), "McNemar, exact"
    else:
        sums = [abs(float((draw.choice((-1.0, 1.0), count) * apart).sum())) for _ in range(DRAWS)]
        extreme = sum(one >= abs(apart.sum()) - 1e-9 for one in sums)
        p, test = (extreme + 1) / (DRAWS + 1), "change of sides"
    found = {"difference": float(apart.mean()), "low": float(low), "high": float(high), "p": p, "test": test}
    return found | {"better": better, "worse": worse, "pairs": count}


def mcnemar(better: int, worse: int) -> float:
    """The two-sided exact p-value of McNemar's test from the numbers of discordant pairs."""
    pairs = better + worse
    return min(1.0, 2 * sum(math.comb(pairs, count) for count in range(min(better, worse) + 1)) / 2**pairs)
