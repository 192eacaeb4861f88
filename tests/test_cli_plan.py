"""`whimbrel plan`: every option arrives, JSON has the keys that others read, mistakes are one line."""

from __future__ import annotations

import json

import pytest

from whimbrel import cli


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    arguments = ("plan", "nemotron-nano-9b-v2", "--memory", "22GiB", "--context", "131072", "--bandwidth", "600GB/s")
    assert cli.main([*arguments, "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys)
    assert (found["parameters"], found["kv_bytes"], found["fits"]) == (8_888_227_328, 2 * 2**30, True)
    assert {"weights_bytes", "state_bytes", "total_bytes", "largest_batch"} <= set(found)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (("--memory", "18GiB"), "fits", False),
        (("--context", "65536"), "kv_bytes", 2**30),
        (("--batch", "2"), "kv_bytes", 2**32),
        (("--dtype", "float32"), "kv_bytes", 2**32),
        (("--bandwidth", "1TB/s"), "bandwidth", 1e12),
        (("--peak", "125TFLOP/s"), "peak", 1.25e14),
        (("--reserve", "1GiB"), "reserve_bytes", 2**30),
    ],
)
def test_every_option_arrives(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], key: str, value: object
) -> None:
    assert planned(capsys)[key] != value
    assert planned(capsys, *words)[key] == value


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "nemotron-nano-12b-v2", "--memory", "19.66GiB", "--context", "131072", "--bandwidth", "600GB/s")
    assert cli.main(words) == 0
    assert "does not fit" in capsys.readouterr().out


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "qwen3-8b", "--memory", "22GB?", "--context", "64"]) == 2
    assert capsys.readouterr().err == "whimbrel: memory is '22GB?'; set memory to a size such as 22GiB, 22GB or 600MB\n"
    assert cli.main(["plan", "qwen3-8b", "--context", "64"]) == 2
    assert "--memory" in capsys.readouterr().err
