"""Run: pytest tests/ops/test_machine.py. The measured floors are sane, quick and kept."""

from __future__ import annotations

import ctypes
import resource
import time
from pathlib import Path

import pytest
import torch

from whimbrel.ops import cpu, machine
from whimbrel.ops.memory import kept


def test_bandwidth_and_peak_are_plausible_and_cached() -> None:
    bandwidth, peak = machine.bandwidth(), machine.matmul_peak()
    assert 1e8 < bandwidth < 2e12, "no CPU reads slower than a disk or faster than a GPU"
    assert 1e9 < peak < 1e14
    start = time.perf_counter()
    assert (machine.bandwidth("cpu"), machine.matmul_peak("cpu", torch.float32)) == (bandwidth, peak)
    assert time.perf_counter() - start < 0.01


def test_the_peak_in_bfloat16_is_that_of_our_own_product(monkeypatch) -> None:
    """Never torch's, which is slow or fatal on some processors; without ours it is that of float32."""
    peak, mm = machine.matmul_peak(), torch.mm
    if cpu.isa() not in (None, "baseline"):
        monkeypatch.setattr(torch, "mm", None)
        assert machine.matmul_peak("cpu", torch.bfloat16) > (1.2 if cpu.isa() == "bf16" else 0.5) * peak
        monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(machine, "isa", lambda: "baseline")
    assert machine.matmul_peak("cpu", torch.bfloat16) == peak


def test_a_floor_is_not_beaten_by_the_same_work() -> None:
    """A plain copy of the measurement is not much faster than the figure (a factor of 2 for a busy machine)."""
    buffer = torch.ones(machine.CPU_BUFFER // 4)
    start = time.perf_counter()
    buffer.sum()
    assert buffer.nbytes / (time.perf_counter() - start) < 2 * machine.bandwidth()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this system has no glibc")
@pytest.mark.skipif(hasattr(ctypes.CDLL(None), "__asan_init"), reason="the malloc that checks addresses is another one")
def test_memory_is_kept_inside_and_given_back_after():
    def touched() -> int:
        """Pages touched for the first time while a large tensor is filled and freed."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    with kept():
        touched()
        with kept():  # what is already kept stays so
            assert touched() < 100
        assert touched() < 100
    assert resident() - before < 32 << 20


def test_a_system_that_refuses_the_room_still_trains(monkeypatch):
    monkeypatch.setattr("whimbrel.ops.memory.os.sysconf", lambda name: 1 << 30)
    with kept():
        assert torch.ones(3).sum() == 3
