"""A stage of a recipe in several processes: one voice, one clear line when one of them fails, a stop together."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flock import TABLE
from rich.console import Console
from small import HYBRID
from small_world import build

from whimbrel.data import shards
from whimbrel.errors import UserError
from whimbrel.model.language import LanguageModel
from whimbrel.pipeline import recipe
from whimbrel.pipeline.console import Display
from whimbrel.pipeline.run import StageError, run
from whimbrel.text import Tokenizer

TRAIN = {
    "steps": 6,
    "accumulate": 4,
    "threads": 1,
    "checkpoint_every": 2,
    "tensorboard": False,
    "optimizer": {"learning_rate": 0.003},
    "schedule": {"warmup_steps": 2},
}
DRIVER = """
import sys
from pathlib import Path
from flock import TABLE
from whimbrel.pipeline.console import Display
from whimbrel.pipeline.recipe import read
from whimbrel.pipeline.run import Stopped, run
try:
    run(read(sys.argv[1], sys.argv[3:], TABLE), Path(sys.argv[2]), Display())
except Stopped as stop:
    sys.exit(str(stop))
"""


def graph(axes: dict[str, int], stage: str = "run", launch: Any = None, **settings: Any) -> recipe.Recipe:
    node: dict[str, Any] = {"stage": stage, "config": {"train": TRAIN | {"parallel": axes}, **settings}}
    return recipe.build({"stages": {"flock": node | ({"launch": launch} if launch is not None else {})}}, "x", TABLE)


def go(folder: Path, *args: Any, **words: Any) -> str:
    shown = io.StringIO()
    run(graph(*args, **words), folder, Display(Console(file=shown, soft_wrap=True), every=0.0))
    return shown.getvalue()


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "flock" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    go(folder, {})
    yield folder


@pytest.mark.parametrize(
    ("axes", "words", "say"),
    [
        ({"tensor": 2}, {"launch": {"processes": 3}}, "is 3.*makes 2.*tensor 2.*set launch.processes to 2"),
        ({}, {"launch": {"processes": 2}}, "set launch.processes to 1, or config.train.parallel.data to 2"),
        ({}, {"launch": {"processes": "two"}}, "launch.processes is 'two'; set it to 1"),
        ({"tensor": 2}, {"stage": "alone"}, "makes 2 processes, but this stage runs in one"),
        ({"data": 3}, {}, "train.accumulate is 4, but 3 copies .*; set train.accumulate to 6"),
        ({"fsdp": 0}, {}, "train.parallel.fsdp is 0; set train.parallel.fsdp to 1 or more"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_starts(axes: Any, words: Any, say: str) -> None:
    with pytest.raises(UserError, match=say):
        graph(axes, **words)


def test_processes_follow_from_the_axes_and_are_written_down() -> None:
    made = graph({"data": 2, "tensor": 2})
    assert made.nodes[0].processes == 4
    again = graph({"data": 2, "tensor": 2}, launch={"processes": 4})
    assert again == made and "launch:\n      processes: 4" in made.text()
    assert made.nodes[0].binding == graph({}).nodes[0].binding  # another number of ranks is the same work


@pytest.mark.slow
def test_two_processes_speak_with_one_voice(tmp_path: Path, alone: Path) -> None:
    shown = go(tmp_path, {"tensor": 2})
    for step in range(1, 7):
        assert shown.count(f"flock: {step} of 6 steps") == 1
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)
    LanguageModel.load(tmp_path / "flock" / "model")
    made = json.loads((tmp_path / "flock" / "manifest.json").read_text())
    assert made["probe"]["shape"]["pattern"] == "M-M*-M"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "kind", "say"),
    [
        ("user", UserError, "stage flock: row 9 is torn; set heldout to rows that are whole"),
        ("wheel", StageError, "stage flock failed: RuntimeError: the wheel came off (where: the end of"),
        ("kill", StageError, "stage flock: one of its processes ended without a word, as when memory runs out (log"),
    ],
)
def test_an_error_on_one_process_ends_all_with_one_line(tmp_path: Path, trouble: str, kind: Any, say: str) -> None:
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        go(tmp_path, {"data": 2}, trouble=trouble)
    assert str(caught.value).startswith(say) and "\n" not in str(caught.value)
    assert time.monotonic() - began < 120
    if trouble == "kill":  # and with one process it goes on from where two were
        shown = go(tmp_path, {})
        assert "going on from" in shown and len(losses(tmp_path)) == 6


@pytest.mark.slow
def test_the_wrong_number_for_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage flock: train.parallel.tensor is 3, which does not divide vocab|mamba"):
        go(tmp_path, {"tensor": 3})


@pytest.mark.slow
def test_ctrl_c_stops_all_at_a_safe_point(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(graph({"fsdp": 2}).text().replace("steps: 6", "steps: 80"))
    command = [sys.executable, "-c", DRIVER, str(path), str(tmp_path / "run")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    metrics = tmp_path / "run" / "flock.partial" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert time.monotonic() < deadline and running.poll() is None, running.communicate()[0]
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=120)[0]
    assert "stopping at the next safe point" in said and "stopped after step" in said, said
    shown = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert shown.returncode == 0 and "going on from" in shown.stdout, shown.stdout + shown.stderr
    assert len(losses(tmp_path / "run")) == 80


@pytest.mark.slow
def test_tuning_and_grpo_as_stages_of_a_recipe(tmp_path: Path) -> None:
    """From a random model through two stages of two processes each, with probes between them."""
    given = {name: str(path) for name, path in build(tmp_path / "given").items()}
    small = {"train": TRAIN | {"steps": 2, "parallel": {"data": 2}}}
    first = {"conversations": given["conversations"], "model": given["model"]}
    then = {"prompts": given["prompts"], "model": "sft"}
    again = small["train"] | {"accumulate": 1}
    stages = {
        "sft": {"stage": "sft", "inputs": first, "config": {"length": 256} | small},
        "grpo": {"stage": "grpo", "inputs": then, "config": {"groups": 4, "max_tokens": 8, "train": again}},
    }
    run(recipe.build({"stages": stages}, "x"), tmp_path / "run", Display(Console(file=io.StringIO())))
    for name in stages:
        made = json.loads((tmp_path / "run" / name / "manifest.json").read_text())
        assert made["metrics"]["step"] == 2 and made["probe"]
        assert made["config"]["train"]["parallel"]["data"] == 2


@pytest.mark.slow
def test_the_stage_pretrain_itself(tmp_path: Path) -> None:
    """From token shards and a tokenizer to a folder, by two processes that share the weights."""
    draw, words = (
        np.random.default_rng(0),
        ["the", "whimbrel", "crosses", "an", "ocean", "without", "landing", "and", "returns"],
    )
    texts = [" ".join(draw.choice(words, 30)) for _ in range(60)]
    tokenizer = Tokenizer.train(texts, 330)
    tokenizer.save(tmp_path / "tokenizer")
    for name, part in (("train", texts[:50]), ("heldout", texts[50:])):
        documents = [shards.Tokens([*ids, tokenizer.eos_ids[0]], None, {}) for ids in tokenizer.encode_batch(part)]
        shards.write(tmp_path / "tokens" / name, documents, tokenizer.vocab_size)
    shape = {field: getattr(HYBRID, field) for field in ("pattern", "hidden_size", "intermediate_size", "head_dim")}
    shape |= {f: getattr(HYBRID, f) for f in ("num_attention_heads", "num_key_value_heads", "mamba_num_heads")}
    shape |= {f: getattr(HYBRID, f) for f in ("mamba_head_dim", "ssm_state_size", "n_groups")}
    train = TRAIN | {"parallel": {"fsdp": 2}, "asynchronous": True, "validate_batches": 3}
    node = {
        "stage": "pretrain",
        "inputs": {"tokens": str(tmp_path / "tokens"), "tokenizer": str(tmp_path / "tokenizer")},
        "config": {"model": shape, "length": 32, "batch_rows": 2, "device": "cpu", "train": train},
    }
    run(recipe.build({"stages": {"flock": node}}, "x"), tmp_path / "run", Display(Console(file=io.StringIO())))
    lines = [json.loads(line) for line in (tmp_path / "run" / "flock" / "metrics.jsonl").read_text().splitlines()]
    seen = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(seen) == 2 and seen[1] < seen[0]
    model = LanguageModel.load(tmp_path / "run" / "flock")
    assert Tokenizer.load(tmp_path / "run" / "flock" / "model").vocab_size == model.config.vocab_size
