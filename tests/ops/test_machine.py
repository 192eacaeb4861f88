"""Run: pytest tests/ops/test_machine.py. The measured floors are sane, quick and kept."""

from __future__ import annotations

import time

import torch

from whimbrel.ops import machine


def test_bandwidth_and_peak_are_plausible_and_cached() -> None:
    bandwidth, peak = machine.bandwidth(), machine.matmul_peak()
    assert 1e8 < bandwidth < 2e12, "no CPU reads slower than a disk or faster than a GPU"
    assert 1e9 < peak < 1e14
    start = time.perf_counter()
    assert (machine.bandwidth("cpu"), machine.matmul_peak("cpu", torch.float32)) == (bandwidth, peak)
    assert time.perf_counter() - start < 0.01


def test_a_floor_is_not_beaten_by_the_same_work() -> None:
    """A plain copy of the measurement is not much faster than the figure (a factor of 2 for a busy machine)."""
    buffer = torch.ones(machine.CPU_BUFFER // 4)
    start = time.perf_counter()
    buffer.sum()
    assert buffer.nbytes / (time.perf_counter() - start) < 2 * machine.bandwidth()
