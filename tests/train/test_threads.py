"""The number of threads: found by trial, without a trace, and kept for the life of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_run import TinySource, tiny_model, tiny_train

from whimbrel.events import silent
from whimbrel.train import threads


@pytest.fixture
def two_threads() -> Any:
    with threads.using(2):
        yield


@pytest.mark.parametrize(("most", "tried"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_powers_of_two_are_tried(most: int, tried: list[int]) -> None:
    assert threads.candidates(most) == tried


class Clock:
    """Seconds that pass only when a trial says so."""

    def __init__(self, cost: dict[int, float]) -> None:
        self.now, self.cost, self.trials = 0.0, cost, 0

    def trial(self) -> None:
        self.now += self.cost[torch.get_num_threads()]
        self.trials += 1

    def __call__(self) -> float:
        return self.now


def test_three_trials_after_a_warm_up_are_timed_under_each_number(two_threads: None) -> None:
    clock = Clock({1: 0.5, 2: 4.0})
    assert threads.fastest(clock.trial, [1, 2], clock) == {1: 0.5, 2: 4.0}
    assert clock.trials == 8
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("best", [1, 2])
def test_the_faster_is_kept(best: int, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "fastest", lambda trial, choices: {n: 0.1 if n == best else 0.2 for n in choices})
    assert threads.choose(0, None, lambda: None, silent) == best


def test_what_is_asked_or_recorded_is_not_tried(two_threads: None) -> None:
    def trial() -> None:
        raise AssertionError("a trial was run")

    events: list[dict[str, Any]] = []
    assert threads.choose(3, None, trial, events.append) == 3
    assert threads.choose(0, 2, trial, events.append) == 2
    assert events == []
    assert threads.choose(1, 2, trial, events.append) == 1
    assert "not go on bit for bit" in events[0]["text"]


def test_the_probe_of_a_run_leaves_no_trace(tmp_path: Any, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a probe that picks one thread, the run is the same bit for bit."""
    tried: list[int] = []

    def fastest(trial: Any, choices: Any) -> dict[int, float]:
        tried.extend(choices)
        for _ in range(3):
            trial()
        return {n: float(n) for n in choices}

    monkeypatch.setattr(threads, "fastest", fastest)
    random = torch.get_rng_state()
    probed = tiny_train(tmp_path / "probed", threads=0, steps=4)
    torch.set_rng_state(random)
    plain = tiny_train(tmp_path / "plain", threads=1, steps=4)
    assert tried == [1, 2]
    assert torch.get_num_threads() == 2
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, probed.state_dict()[name]), name


def test_a_resumed_run_takes_the_recorded_number(tmp_path: Any, two_threads: None) -> None:
    class Crash(Exception):
        pass

    def crash(event: dict[str, Any]) -> None:
        if event["event"] == "metrics" and event["step"] == 7:
            raise Crash

    with pytest.raises(Crash):
        tiny_train(tmp_path, crash, threads=1)
    seen: list[int] = []
    tiny_train(tmp_path, lambda event: seen.append(torch.get_num_threads()), threads=0)
    assert set(seen[3:]) == {1}


def test_the_model_and_source_are_small() -> None:
    """The other tests rely on steps of milliseconds."""
    assert sum(p.numel() for p in tiny_model().parameters()) < 10_000
    assert len(TinySource(0).batch(0).tokens_T) < 100
