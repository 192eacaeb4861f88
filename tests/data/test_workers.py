"""Calls in processes of their own: in order, and a call that does not return is killed and marked."""

import math
import os
import time

from whimbrel.data.workers import Lost, each

MEMORY = 4 * 2**30


def test_results_come_in_the_order_of_the_items() -> None:
    items = [0.05, 0.0, 0.01, 0.0, 0.02, 0.0]
    assert list(each(math.exp, items, workers=2, deadline=20, memory=MEMORY)) == [(x, math.exp(x)) for x in items]


def test_a_call_that_never_ends_is_killed_and_the_next_ones_go_on() -> None:
    items = [range(3), range(10**15), range(4)]
    outcomes = list(each(sum, items, workers=1, deadline=0.5, memory=MEMORY))
    assert outcomes == [(items[0], 3), (items[1], Lost("timeout", "0.5 s")), (items[2], 6)]


def test_a_call_that_waits_for_ever_is_killed_as_well() -> None:
    start = time.monotonic()
    outcomes = list(each(time.sleep, [0.0, 3600.0, 0.0], workers=1, deadline=0.3, memory=MEMORY))
    assert outcomes == [(0.0, None), (3600.0, Lost("timeout", "0.3 s")), (0.0, None)]
    assert time.monotonic() - start < 60


def test_the_deadline_is_none_of_a_process_that_has_to_wait_for_its_turn() -> None:
    assert list(each(time.sleep, [1.5], workers=1, deadline=1, memory=MEMORY)) == [(1.5, None)]


def test_a_process_that_dies_and_a_call_that_fails_are_told_apart() -> None:
    assert list(each(os._exit, [3], workers=1, deadline=20, memory=MEMORY)) == [(3, Lost("crashed"))]
    [(_, lost)] = each(math.sqrt, [-1.0], workers=1, deadline=20, memory=MEMORY)
    assert lost.reason == "failed" and lost.detail.startswith("ValueError")


def test_memory_is_capped() -> None:
    [(_, lost)] = each(bytearray, [8 * 2**30], workers=1, deadline=20, memory=MEMORY)
    assert lost.reason == "failed" and lost.detail.startswith("MemoryError")


def test_no_process_outlives_a_reader_that_stops_early() -> None:
    outcomes = each(time.sleep, [0.0] * 50, workers=2, deadline=20, memory=MEMORY)
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]  # a generator
    import multiprocessing

    assert multiprocessing.active_children() == []
