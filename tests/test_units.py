"""Run: pytest tests/test_units.py. Sizes and rates as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import UserError
from whimbrel.units import format_bytes, format_count, parse_bandwidth, parse_bytes, parse_flops


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("22GiB", 22 * 2**30),
        ("22GB", 22 * 10**9),
        (" 600 mb ", 600 * 10**6),
        ("1.5TiB", 3 * 2**39),
        (".5KiB", 512),
        ("4096", 4096),
        ("4_096B", 4096),
        (4096, 4096),
    ],
)
def test_bytes(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["22GB?", "", "GiB", "-1GiB", "22 G", "0", "1e9", "22GiB/s", -5, 0])
def test_nonsense_names_the_setting_and_a_value_that_works(text: str | int) -> None:
    with pytest.raises(UserError, match=r"kv_memory is .*set kv_memory to .*22GiB"):
        parse_bytes(text, "kv_memory")


def test_rates() -> None:
    assert parse_bandwidth("600GB/s") == parse_bandwidth("600gb") == parse_bandwidth(6e11) == 6e11
    assert parse_bandwidth("4.8TB/s") == 4.8e12
    assert parse_flops("790TFLOP/s") == parse_flops("790 TFLOPS") == parse_flops("790tflops/s") == 7.9e14
    for text in ("fast", "600GFLOP/s", "0GB/s", 0.0, float("nan"), -1.0):
        with pytest.raises(UserError, match=r"bandwidth is .*600GB/s"):
            parse_bandwidth(text)
    with pytest.raises(UserError, match=r"peak is .*790TFLOP/s"):
        parse_flops("790GB/s")


def test_formats() -> None:
    assert format_bytes(18.69 * 2**30) == "18.69 GiB"
    assert [format_bytes(n) for n in (0, 512, 1024, 2**20 - 1, 2**50)] == [
        "0 B",
        "512 B",
        "1.00 KiB",
        "1.00 MiB",
        "1024.00 TiB",
    ]
    assert [format_count(n) for n in (42, 9999, 296_880, 134_515_008, 8_888_227_328, 999_999_999)] == [
        "42",
        "9999",
        "296.9k",
        "134.5M",
        "8.888B",
        "1B",
    ]


@given(st.integers(1, 2**60))
def test_written_sizes_read_back(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.006)
