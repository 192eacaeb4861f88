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
        (("--state-dtype", "float16"), "state_dtype", "float16"),
    ],
)
def test_every_option_arrives(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], key: str, value: object
) -> None:
    assert planned(capsys)[key] != value
    assert planned(capsys, *words)[key] == value


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (("tokens=8.64e12",), "run_flops", None),
        (("accumulate=4",), "tokens_per_step", 4 * 8192),
        (("recompute=true",), "recompute", True),
        (("mfu=0.5",), "mfu", 0.5),
        (("causal=false",), "flops_per_token", None),
        (("parallel.tensor=2",), "processes", 2),
        (("parallel.context=2",), "processes", 2),
        (("accumulate=6", "parallel.data=2", "parallel.fsdp=3"), "processes", 6),
        (("--batch", "2"), "tokens_per_step", 2 * 8192),
        (("--reserve", "1GiB"), "reserve_bytes", 2**30),
        (("--dtype", "float32"), "activation_bytes", None),
        (("--memory", "400GiB"), "fits", True),
        (("--peak", "1TFLOP/s"), "peak", 1e12),
    ],
)
def test_every_setting_of_training_arrives(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], key: str, value: object
) -> None:
    """None: the figure only has to change."""
    usual = ("--memory", "100GiB", "--context", "8192", "--train", "--peak", "989TFLOP/s")
    before, after = planned(capsys, *usual)[key], planned(capsys, *usual, *words)[key]
    assert before != after and (value is None or after == value)


def test_a_state_of_16_bits_takes_half_and_moves_half(capsys: pytest.CaptureFixture[str]) -> None:
    wide, half = planned(capsys), planned(capsys, "--state-dtype", "float16")
    assert 0.5 < half["state_bytes"] / wide["state_bytes"] < 0.52, "the tail of the convolution stays as it is"
    assert wide["decode_bytes"] - half["decode_bytes"] == 2 * (wide["state_bytes"] - half["state_bytes"])
    short = ("--context", "4096")
    assert (
        planned(capsys, *short, "--state-dtype", "float16")["largest_batch"] > planned(capsys, *short)["largest_batch"]
    )
    assert cli.main(["plan", "hybrid-tiny", "--memory", "1GiB", "--context", "64", "--state-dtype", "bfloat16"]) == 2
    assert "set state_dtype to float32 or float16" in capsys.readouterr().err


def test_settings_of_training_need_the_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "hybrid-tiny", "--memory", "1GiB", "--context", "512", "tokens=1e9"]) == 2
    assert "tokens=1e9 is a setting of training; add --train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("kv_dtype=fp8", "keys and values have the dtype of the arithmetic; set --dtype"),
        ("state_dtype=float16", "state_dtype=float16 is an option; write --state-dtype float16"),
        ("batch=3", "write --batch 3"),
        ("parallel.fsdp=2", "parallel.fsdp=2 is a setting of training; add --train"),
        ("tokes=3", "unknown setting 'tokes'; did you mean 'tokens'?"),
    ],
)
def test_a_setting_in_the_wrong_place_is_told_where_it_belongs(
    capsys: pytest.CaptureFixture[str], said: str, words: str
) -> None:
    assert cli.main(["plan", "hybrid-tiny", "--memory", "1GiB", "--context", "512", said]) == 2
    found = capsys.readouterr().err
    assert words in found and found.count("\n") == 1


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "nemotron-nano-12b-v2", "--memory", "19.66GiB", "--context", "131072", "--bandwidth", "600GB/s")
    assert cli.main(words) == 0
    assert "does not fit" in capsys.readouterr().out


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "qwen3-8b", "--memory", "22GB?", "--context", "64"]) == 2
    assert capsys.readouterr().err == "whimbrel: memory is '22GB?'; set memory to a size such as 22GiB, 22GB or 600MB\n"
    assert cli.main(["plan", "qwen3-8b", "--context", "64"]) == 2
    assert "--memory" in capsys.readouterr().err
