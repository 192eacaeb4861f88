"""Blends: shares exact by phase and even in between, caps kept, every step found without the ones before it."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from whimbrel.data.blend import Blend, Phase, apportion
from whimbrel.data.pack import Row
from whimbrel.errors import UserError


@dataclass(frozen=True)
class Marked:
    """Rows of one token that say where they come from: source * 1e6 + index."""

    source: int
    count: int

    def row(self, index: int) -> Row:
        token = np.array([self.source * 1_000_000 + index])
        return Row(token, token, (1,))

    def tokens_between(self, start: int, stop: int) -> int:
        return stop - start


def rows(blend: Blend) -> list[tuple[int, int]]:
    """(source, index) of every row of the run."""
    tokens = [t for step in range(blend.batches) for t in blend.batch(step).tokens_T.tolist()]
    return [divmod(token, 1_000_000) for token in tokens]


WEIGHTS = st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(phases=st.lists(WEIGHTS, min_size=1, max_size=3), batches=st.integers(1, 60), batch_rows=st.integers(1, 7))
def test_shares_order_and_evenness(phases: list[list[float]], batches: int, batch_rows: int) -> None:
    names = "abcde"
    assume(all(sum(weights) > 1e-6 for weights in phases))
    sources = {name: Marked(j, 1000) for j, name in enumerate(names)}
    plan = [Phase((i + 1) / len(phases), dict(zip(names, weights, strict=False))) for i, weights in enumerate(phases)]
    blend = Blend(sources, plan, batch_rows, batches)
    seen = rows(blend)
    assert len(seen) == blend.length
    for j in range(len(names)):  # each source hands out its rows in order, without a gap
        mine = [index for source, index in seen if source == j]
        assert mine == list(range(len(mine)))
    first = 0
    for i, phase in enumerate(plan):
        last = round(phase.until * batches) * batch_rows
        counted = np.array([[source == j for source, _ in seen[first:last]] for j in range(len(names))])
        total = sum(phase.weights.values())
        for j, name in enumerate(names):
            share = phase.weights.get(name, 0) / total
            assert abs(counted[j].sum() - share * (last - first)) < 1  # exact but for whole numbers
            running = np.cumsum(counted[j])
            assert (np.abs(running - share * np.arange(1, last - first + 1)) < len(names)).all()
        table = [portion.rows for portion in blend.table() if portion.phase == i]
        assert table == counted.sum(1).astype(int).tolist()
        first = last


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(0, 5, allow_subnormal=False), min_size=1, max_size=6),
    room=st.lists(st.one_of(st.integers(0, 50), st.just(math.inf)), min_size=6, max_size=6),
    slots=st.integers(0, 200),
)
def test_apportion(weights: list[float], room: list[float], slots: int) -> None:
    room = room[: len(weights)]
    counts = apportion(slots, weights, room)
    able = sum(cap for weight, cap in zip(weights, room, strict=True) if weight)
    if able < slots:
        assert counts is None
        return
    assert counts is not None and sum(counts) == slots
    assert all(0 <= count <= cap for count, cap in zip(counts, room, strict=True))
    assert all(weight or not count for count, weight in zip(counts, weights, strict=True))
    open_ = [j for j, count in enumerate(counts) if count < room[j] and weights[j]]
    for a in open_:  # those below their caps keep the proportions of their weights
        for b in open_:
            assert abs(counts[a] - counts[b] * weights[a] / weights[b]) <= 1 + weights[a] / weights[b] + 1e-9


def test_the_phases_of_the_paper_and_a_cap() -> None:
    sources = {"web": Marked(0, 5000), "books": Marked(1, 100), "math": Marked(2, 400)}
    phases = [
        Phase(0.6, {"web": 80, "books": 10, "math": 10}),
        Phase(0.9, {"web": 40, "books": 30, "math": 30}),
        Phase(1.0, {"math": 1}),
    ]
    blend = Blend(sources, phases, batch_rows=4, batches=250, epochs={"books": 1.0})
    counts = [(p.phase, p.source, p.rows) for p in blend.table()]
    assert counts == [
        (0, "web", 480), (0, "books", 60), (0, "math", 60),
        (1, "web", 149), (1, "books", 40), (1, "math", 111),  # 90 books asked, 40 left; 50 go to the others, 4 to 3
        (2, "web", 0), (2, "books", 0), (2, "math", 100),
    ]  # fmt: skip
    assert {source for source, _ in rows(blend)[-100:]} == {2}
    assert max(index for source, index in rows(blend) if source == 1) == 99
    text = blend.preview()
    assert "books" in text and "13.33%" in text and "30.00%" in text  # given, asked


def test_a_step_needs_none_before_it() -> None:
    sources = {"a": Far(0), "b": Far(1), "c": Far(2)}
    blend = Blend(sources, [Phase(1.0, {"a": 0.2, "b": 0.3, "c": 0.5})], batch_rows=10, batches=10**8)
    last = [divmod(token, FAR) for token in blend.batch(10**8 - 1).tokens_T.tolist()]
    assert {source: max(i for s, i in last if s == source) for source in range(3)} == {
        0: 2 * 10**8 - 1,
        1: 3 * 10**8 - 1,
        2: 5 * 10**8 - 1,
    }
    two = [divmod(token, FAR) for step in (12_345_678, 12_345_679) for token in blend.batch(step).tokens_T.tolist()]
    for source, rows_of_20 in enumerate((4, 6, 10)):  # the middle of a long run goes on without gap or repeat
        mine = [index for s, index in two if s == source]
        assert mine == list(range(mine[0], mine[0] + len(mine))) and abs(len(mine) - rows_of_20) <= 1


FAR = 10**10


@dataclass(frozen=True)
class Far:
    """A source with more rows than anybody walks through."""

    source: int
    count: int = 10**9

    def row(self, index: int) -> Row:
        token = np.array([self.source * FAR + index])
        return Row(token, token, (1,))

    def tokens_between(self, start: int, stop: int) -> int:
        return stop - start


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"phases": [Phase(1.0, {"c": 1.0})]}, "source 'c'; known: a, b"),
        ({"phases": [Phase(1.0, {"a": -1.0})]}, "weights"),
        ({"phases": [Phase(1.0, {"a": 0.0})]}, "one of them above 0"),
        ({"phases": [Phase(0.9, {"a": 1.0})]}, "last one 1.0"),
        ({"phases": [Phase(0.5, {"a": 1.0}), Phase(0.5, {"a": 1.0}), Phase(1.0, {"a": 1.0})]}, "growing"),
        ({"phases": []}, "last one 1.0"),
        ({"batches": 0}, "batches 0; set each to 1"),
        ({"sources": {}}, "0 sources"),
        ({"epochs": {"a": 0.0}}, "epochs of a is 0.0; set it above 0"),
        ({"epochs": {"a": 2.0, "b": 1.5}}, r"needs 100 rows.*a=2, b=1.5.*raise those"),
    ],
)
def test_what_cannot_be_blended_says_why(change: dict, match: str) -> None:
    good = {
        "sources": {"a": Marked(0, 10), "b": Marked(1, 10)},
        "phases": [Phase(1.0, {"a": 1.0, "b": 1.0})],
        "batch_rows": 10,
        "batches": 10,
    }
    Blend(**good)
    with pytest.raises(UserError, match=match):
        Blend(**(good | change))
