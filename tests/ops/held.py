"""How much memory this process holds: what is resident, and what malloc has given out in all arenas."""

import ctypes
import gc
from pathlib import Path

import pytest


class _Mallinfo2(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


def held() -> tuple[int, int]:
    """Bytes resident, and bytes of malloc in use (glibc counts them; blocks that are mapped by themselves included)."""
    libc, statm = ctypes.CDLL(None), Path("/proc/self/statm")
    checked = hasattr(libc, "__asan_init")  # its malloc keeps what is freed, and counts nothing
    if not statm.exists() or not hasattr(libc, "mallinfo2") or checked:
        pytest.skip("this system does not say what is held")
    gc.collect()
    libc.mallinfo2.restype = _Mallinfo2
    info = libc.mallinfo2()
    return int(statm.read_text().split()[1]) * 4096, info.uordblks + info.hblkhd


def assert_nothing_more(before: tuple[int, int], resident: int = 4 << 20, heap: int = 64 << 10) -> None:
    """`held` has grown by less than this many bytes."""
    after = held()
    assert after[1] - before[1] < heap, f"malloc holds {after[1] - before[1]:,} bytes more"
    assert after[0] - before[0] < resident, f"{after[0] - before[0]:,} bytes more are resident"
