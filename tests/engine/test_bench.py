"""`whimbrel bench`: the parts of a step add up, bytes are those of what lies in memory, every option arrives."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from whimbrel import LanguageModel, cli, ops
from whimbrel.engine import bench
from whimbrel.errors import UserError
from whimbrel.model import checkpoint, count
from whimbrel.model.linear import pack_model
from whimbrel.model.presets import PRESETS
from whimbrel.ops import cpu
from whimbrel.ops.cpu import library

TINY = PRESETS["hybrid-tiny"]
MACHINE = {"bandwidth": 1e10, "peak": 1e11}


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(TINY).initialise(0)


@pytest.mark.parametrize("task", ["prefill", "decode"])
def test_the_parts_add_up_to_the_wall(model: LanguageModel, task: str) -> None:
    row = bench.measure(bench.Task(model, 40, 2), task, **MACHINE)
    parts = [row[f"{part}_seconds"] for part in ("native", "torch", "python")]
    assert sum(parts) == pytest.approx(row["seconds"])
    assert min(parts) >= 0 < row["torch_seconds"]
    assert (row["native_seconds"] > 0) == (cpu.isa() is not None)
    rate = row["tokens_per_second"]
    assert rate == pytest.approx((40 if task == "prefill" else 2) / row["seconds"])
    assert row["bandwidth_share"] == pytest.approx(row["bytes_per_token"] * rate / 1e10)
    assert row["peak_share"] == pytest.approx(row["flops_per_token"] * rate / 1e11)


def test_time_goes_where_it_is_spent() -> None:
    """Work of each kind alone is counted as that kind."""
    matrix = torch.randn(300, 300)
    split = bench.parts(lambda: matrix @ matrix @ matrix, 0.1)
    assert split["torch_seconds"] > 0.8 * split["seconds"]
    split = bench.parts(lambda: sum(range(20_000)), 0.1)
    assert split["python_seconds"] > 0.9 * split["seconds"]
    if cpu.isa() is None:
        pytest.skip("no native library")
    rows, weight = torch.randn(4, 2048), torch.randn(4096, 2048)
    with torch.inference_mode():
        split = bench.parts(lambda: cpu.linear(rows, weight), 0.1)
    assert split["native_seconds"] > 0.8 * split["seconds"]


def test_calls_are_timed_only_inside_the_block() -> None:
    if cpu.isa() is None:
        pytest.skip("no native library")

    def work() -> None:
        with torch.inference_mode():
            cpu.linear(torch.ones(1, 512), torch.ones(512, 512))

    with library.timed() as outer:
        work()
        with library.timed() as inner:
            work()
    seen = (outer.seconds, inner.seconds)
    assert seen[0] > seen[1] > 0
    work()
    assert (outer.seconds, inner.seconds) == seen


@pytest.mark.parametrize("name", ["hybrid-tiny", "dense-tiny"])
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_those_counted_from_the_config(name: str, tied: bool) -> None:
    config = replace(PRESETS[name], tie_embeddings=tied)
    task = bench.Task(LanguageModel(config).initialise(0), 47, 3)
    assert task.bytes("decode") == sum(count.decode_bytes(config, 47, 3, "float32").values())


def test_fewer_bits_move_fewer_bytes() -> None:
    model = LanguageModel(replace(TINY, tie_embeddings=False)).initialise(0)
    wide = bench.Task(model, 8, 1).bytes("decode")
    pack_model(model, 8)
    assert bench.Task(model, 8, 1).bytes("decode") < 0.45 * wide


def test_a_state_of_16_bits_moves_half(model: LanguageModel) -> None:
    wide, half = (bench.Task(model, 8, 2, kind) for kind in ("float32", "float16"))
    assert wide.bytes("decode") - half.bytes("decode") == wide.state.bytes()["ssm"]
    half.decode()


def test_decoding_at_a_depth_is_decoding_after_a_prompt(model: LanguageModel) -> None:
    """The same state, the same token at the same place: what is timed is what an engine computes."""
    task = bench.Task(model, 21, 1)
    task.prefill()
    keys = {layer: side.clone() for layer, side in task.state.k.items()}
    tokens = torch.cat([task.tokens_T[:21], task.tokens_T[:1]])
    with torch.inference_mode():
        assert task.decode().tolist() == model(tokens[None])[0, -1:].argmax(-1).tolist()
    for layer, side in task.state.k.items():
        changed = (side != keys[layer]).flatten(0, 1).flatten(1).any(1)
        assert changed.nonzero().flatten().tolist() == [21]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["bench", *words]) == 0
    return capsys.readouterr().out


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    threads = torch.get_num_threads()
    options = ("--context", "5,9", "--batch", "1,2", "--threads", "2")
    try:
        found = json.loads(said(capsys, "hybrid-tiny", *options, "--dtype", "int8", "--json"))
        text = said(capsys, "dense-tiny", *options)
        halved = json.loads(said(capsys, "hybrid-tiny", *options, "--state-dtype", "float16", "--json"))
    finally:
        torch.set_num_threads(threads)
    assert (found["model"], found["dtype"], found["threads"]) == ("hybrid-tiny", "int8", 2)
    assert {"parameters", "native", "bandwidth", "peak"} <= set(found)
    assert (found["state_dtype"], halved["state_dtype"]) == ("float32", "float16")
    assert set(found["rows"][0]) == {
        "task", "context", "batch", "tokens_per_second", "seconds", "native_seconds", "torch_seconds", "python_seconds",
        "bytes_per_token", "flops_per_token", "bandwidth_share", "peak_share",
    }  # fmt: skip
    tasks = [(row["task"], row["context"], row["batch"]) for row in found["rows"]]
    assert tasks == [("prefill", c, 1) for c in (5, 9)] + [("decode", c, b) for c in (5, 9) for b in (1, 2)]
    assert len(text.splitlines()) == 3 + len(tasks)


def test_a_folder_is_measured_with_its_own_weights(tmp_path, model: LanguageModel) -> None:
    model.save(tmp_path / "m")
    tokens = torch.arange(7)[None]
    for dtype, close in (("float32", 0.0), ("float16", 0.01), ("int8", 0.1), ("fp8", 0.3), ("int4", 1.0)):
        off = (bench.load(str(tmp_path / "m"), dtype)(tokens) - model(tokens)).abs().max() / model(tokens).abs().max()
        assert 0.01 * close <= off <= close


@pytest.mark.parametrize("dtype", ["int8", "int4", "fp8"])
def test_few_bits_as_on_a_gpu_hold_what_plan_counts(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "by_rows", lambda device: True)
    model = bench.load("hybrid-tiny", dtype)
    assert {m.form for m in model.modules() if hasattr(m, "form")} == {"fp8" if dtype == "fp8" else "rows"}
    assert model.dtype == model.kv_dtype == torch.bfloat16
    task = bench.Task(model, 47, 3)
    assert task.bytes("decode") == sum(count.decode_bytes(model.config, 47, 3, dtype).values())
    with ops.using("torch"):
        assert task.decode().shape == (3,)


def test_a_folder_of_few_bits_is_taken_as_it_is(tmp_path) -> None:
    bench.load("hybrid-tiny", "int8").save(tmp_path / "q")
    same = bench.load(str(tmp_path / "q"), "int8")
    assert {m.bits for m in same.modules() if hasattr(m, "bits")} == {8}
    for dtype in ("int4", "fp8", "float16"):
        with pytest.raises(UserError, match=rf"dtype is {dtype}, but .* holds int8; set dtype to int8"):
            bench.load(str(tmp_path / "q"), dtype)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--context", "0"), "context is '0'"),
        (("--context", "512,x"), "context is '512,x'"),
        (("--batch", ""), "batch is ''"),
        (("--dtype", "int3"), "dtype is 'int3'"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], part: str) -> None:
    assert cli.main(["bench", "hybrid-tiny", *words]) == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1
