"""recipes/first-flight.yaml, made short: real pages to a model that writes; then again, broken, and killed."""

from __future__ import annotations

import html
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("fastwarc")

from whimbrel.errors import UserError
from whimbrel.pipeline import manifest, recipe, run
from whimbrel.pipeline.console import Display, figure

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "first-flight.yaml"
STAGES = ("documents", "tokenizer", "tokens", "pretrain", "sample")
TIMES = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
SHORT = [
    "documents.workers=1",
    "tokenizer.vocab_size=700",
    "tokens.heldout=0.1",
    "pretrain.length=64",
    "pretrain.model.hidden_size=32",
    "pretrain.model.intermediate_size=64",
    "pretrain.train.steps=14",
    "pretrain.train.validate_every=5",
    "pretrain.train.validate_batches=2",
    "pretrain.train.checkpoint_every=3",
    "pretrain.train.threads=1",
    "pretrain.train.tensorboard=false",
    "pretrain.train.optimizer.learning_rate=1e-2",
    "pretrain.train.schedule.warmup_steps=2",
    "sample.max_tokens=12",
    "sample.prompts=[The function returns, A table]",
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every twelfth page of the archive: each record is a member of its own in the compressed file."""
    from fastwarc.warc import ArchiveIterator

    whole = ROOT / "data" / "pages" / "whimbrel-pages.warc.gz"
    with open(whole, "rb") as file:
        starts = [record.stream_pos for record in ArchiveIterator(file, parse_http=False)]
    data = whole.read_bytes()
    ends = [*starts[1:], len(data)]
    path = tmp_path_factory.mktemp("pages") / "pages.warc.gz"
    path.write_bytes(b"".join(data[a:b] for a, b in list(zip(starts, ends, strict=True))[1::12]))
    return path


def short(pages: Path, *more: str) -> list[str]:
    return [f"stages.documents.inputs.pages={pages}", *SHORT, *more]


def fly(folder: Path, overrides: list[str]) -> str:
    shown = io.StringIO()
    run.run(recipe.read(RECIPE, overrides), folder, Display(Console(file=shown, soft_wrap=True), every=0.5))
    return shown.getvalue()


@pytest.fixture(scope="module")
def flown(pages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = tmp_path_factory.mktemp("flight") / "run"
    fly(folder, short(pages))
    return folder


def manifests(folder: Path) -> dict[str, Any]:
    found = {name: manifest.read(folder / name) for name in STAGES}
    return {name: made for name, made in found.items() if made is not None}


class Words(HTMLParser):
    """The text of a page, and whatever would make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.skip = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.skip += tag in ("script", "style")
        self.fetched += [
            f"{tag} {name}={value}" for name, value in attributes if name in ("src", "href", "srcset", "data")
        ]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.skip -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.skip:
            self.text.append(data)


def test_the_report_shows_what_was_measured(flown: Path) -> None:
    source = (flown / "report.html").read_text(encoding="utf-8")
    page = Words()
    page.feed(source)
    assert not page.open  # every element is closed
    words = " ".join(" ".join(page.text).split())
    made = manifests(flown)
    seen = made["documents"]["metrics"]
    assert f"{seen['pages']} pages became {seen['documents']} documents" in words
    for reason, number in seen["dropped"].items():
        assert str(number) in words, reason
    loss = made["pretrain"]["metrics"]["validation_loss"]
    assert f"held-out loss {loss:.3f} perplexity {math.exp(loss):,.1f}" in words
    records = [json.loads(line) for line in (flown / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    held = [record for record in records if "validation_loss" in record]
    assert [record["step"] for record in held] == [0, 5, 10, 14]
    for record in held:
        assert f"{record['validation_loss']:.4f}" in words
    assert "tokens to a model" in words and f"loss {figure(made['pretrain']['metrics']['loss'])}" in words
    for sample in json.loads((flown / "sample" / "samples.json").read_text())["samples"]:
        for who in ("trained", "untrained"):
            assert " ".join(f"{sample['prompt']} {sample[who]['text']}".split()) in words
    for name, manifest_ in made.items():
        assert name in words and manifest_["key"][:12] in words
    curve = json.loads(re.search(r'id="curve">(.*?)</script>', source, re.DOTALL).group(1))  # type: ignore[union-attr]
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    assert [(row[0], row[2]) for row in curve["train"]] == losses


def test_the_report_needs_nothing_from_outside(flown: Path) -> None:
    source = (flown / "report.html").read_text(encoding="utf-8")
    page = Words()
    page.feed(source)
    assert page.fetched == []
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|\bimport\(", source)


def test_what_pages_and_models_say_is_text_in_the_report(flown: Path, tmp_path: Path) -> None:
    from whimbrel.pipeline import report

    made = manifests(flown)
    made["sample"] |= {"name": "sample"}
    shutil.copytree(flown, tmp_path / "run")
    path = tmp_path / "run" / "sample" / "samples.json"
    found = json.loads(path.read_text())
    trick = "</p><script>alert(1)</script> & <b>"
    found["samples"][0]["trained"]["text"] = trick
    path.write_text(json.dumps(found))
    graph = recipe.Recipe("x", "<i>about</i>", None, ())
    written = report.write(tmp_path / "run", graph, list(made.values())).read_text(encoding="utf-8")
    assert html.escape(trick, quote=False) in written and "<script>alert" not in written
    assert "<i>about</i>" not in written


def test_training_has_taught_it_something(flown: Path) -> None:
    records = [json.loads(line) for line in (flown / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    held = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert abs(held[0] - math.log(700)) < 0.3  # random weights know nothing
    assert held[-1] < held[0] - 0.2


def test_again_does_nothing(flown: Path, pages: Path) -> None:
    before = {path: path.stat().st_mtime_ns for name in STAGES for path in (flown / name).rglob("*")}
    report = (flown / "report.html").read_text()
    shown = fly(flown, short(pages))
    assert shown.count("nothing has changed") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for name in STAGES for path in (flown / name).rglob("*")} == before
    assert (flown / "report.html").read_text() == report


def test_the_resolved_recipe_is_the_same_run(flown: Path) -> None:
    graph = recipe.read(flown / "recipe.yaml")
    shown = io.StringIO()
    run.run(graph, flown, Display(Console(file=shown, soft_wrap=True)))
    assert shown.getvalue().count("nothing has changed") == len(STAGES)


def test_a_model_that_was_changed_is_not_read(flown: Path, pages: Path, tmp_path: Path) -> None:
    """One tensor is scaled by a hundredth: sizes are as before, the logits are not."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "run"
    shutil.copytree(flown, folder)
    (path,) = (folder / "pretrain" / "model").glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if "out_proj" in name)
    tensors[name] = tensors[name] * 1.01
    size = path.stat().st_size
    save_file(tensors, path, metadata={"format": "pt"})
    if path.stat().st_size != size:  # the manifest would notice that by itself
        pytest.skip("safetensors wrote another header")
    with pytest.raises(UserError, match="does not give the logits recorded"):
        fly(folder, short(pages, "sample.temperature=0"))


@pytest.mark.slow
def test_killed_at_random_it_ends_the_same(flown: Path, pages: Path, tmp_path: Path) -> None:
    """kill -9 of the run and all it has started, again and again, at random moments; then to the end."""
    folder, draw = tmp_path / "run", random.Random(2)
    command = [sys.executable, "-m", "whimbrel", "run", str(RECIPE), "--out", str(folder), *short(pages)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    kills = 0
    for _ in range(12):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(draw.uniform(1.5, 5.0))
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            time.sleep(0.2)
    assert kills >= 2
    fly(folder, short(pages))
    expected, found = manifests(flown), manifests(folder)
    for name in STAGES:
        for made in (expected[name], found[name]):
            for loose in ("wall_seconds", "peak_memory_bytes", "finished", "sessions", "files", "commit"):
                made.pop(loose)
            for loose in TIMES:
                made["metrics"].pop(loose, None)
        assert found[name] == expected[name]
    losses = [
        [
            {key: value for key, value in json.loads(line).items() if key not in TIMES}
            for line in (where / "pretrain" / "metrics.jsonl").read_text().splitlines()
        ]
        for where in (flown, folder)
    ]
    assert losses[0] == losses[1]
