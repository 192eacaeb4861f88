"""What this machine can do at best, measured: how fast it reads memory and how fast it multiplies matrices.

Each measurement takes about a second and is kept for the life of the process, a device, dtype and number of threads.
They are the two floors of every speed that Whimbrel prints: bytes / bandwidth and operations / peak.

What is measured: the best of several repeats, through torch (products on a CPU: through ours), with torch's threads, on
the machine as busy as it is now. A sum over float32 was as fast as C's memchr and numpy's max where we tried (Xeon,
2026-11-21), so the sum itself is not the limit there. What is not: the data sheet's figure, writes, random access,
caches (the buffer is larger), links between devices, or what another dtype or shape of matrix would reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial

import torch

from whimbrel.ops.cpu.library import isa
from whimbrel.ops.cpu.matmul import product, rounding

SECONDS = 0.7
CPU_BUFFER = 512 * 2**20
GPU_BUFFER = 4 * 2**30


def bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes a second that a sum over a float32 buffer reads: 512 MiB on a CPU, 4 GiB on a GPU."""
    return _bandwidth(str(device), torch.get_num_threads())


def matmul_peak(device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> float:
    """Operations a second of a square matrix product (a multiply-add is two): n 1024 on a CPU, 8192 on a GPU.

    dtype None: bfloat16 on a GPU, else float32. On a CPU the product is our own in both (torch's bfloat16 is slow, or
    fatal, on some); where there is none it is torch's in float32.
    """
    on_cpu = torch.device(device).type == "cpu"
    if dtype is None or (on_cpu and not _ours()):
        dtype = torch.float32 if on_cpu else torch.bfloat16
    return _matmul_peak(str(device), dtype, torch.get_num_threads())


def _ours() -> bool:
    return isa() not in (None, "baseline")


@cache
def _bandwidth(device: str, threads: int) -> float:
    size = CPU_BUFFER if torch.device(device).type == "cpu" else GPU_BUFFER
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    return size / _fastest(lambda: buffer.sum(), device)


@cache
def _matmul_peak(device: str, dtype: torch.dtype, threads: int) -> float:
    on_cpu = torch.device(device).type == "cpu"
    n, native = 1024 if on_cpu else 8192, on_cpu and _ours()
    left, right, out = (torch.randn(n, n, device=device).to(torch.float32 if native else dtype) for _ in range(3))
    work = partial(product, left, right, out) if native else partial(torch.mm, left, right, out=out)
    with rounding(dtype == torch.bfloat16):
        return 2 * n**3 / _fastest(work, device)


def _fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of as many runs as SECONDS hold (three at least), after one to warm up."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)
    work()
    wait()
    best, runs, end = float("inf"), 0, time.perf_counter() + SECONDS
    while runs < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        wait()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best
