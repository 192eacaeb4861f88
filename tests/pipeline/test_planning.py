"""Run: pytest tests/pipeline/test_planning.py. Every way to name a model leads to its shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from whimbrel.errors import UserError
from whimbrel.model.language import LanguageModel
from whimbrel.model.presets import preset
from whimbrel.ops import machine
from whimbrel.pipeline import planning

RECIPE = """
name: small
stages:
  documents: {{stage: data, inputs: {{pages: {pages}}}}}
  words: {{stage: tokenizer, inputs: {{documents: documents}}, config: {{vocab_size: 777}}}}
  tokens: {{stage: tokens, inputs: {{documents: documents, tokenizer: words}}}}
  pretrain:
    stage: pretrain
    inputs: {{tokens: tokens, tokenizer: words}}
    config: {{model: {{preset: hybrid-tiny, hidden_size: 96}}}}
"""


def test_preset() -> None:
    made = planning.run("nemotron-nano-9b-v2", "19.66GiB", 131_072, bandwidth="600GB/s", reserve="100MiB")
    assert made.fits
    assert made.bandwidth == 6e11
    assert made.reserve_bytes == 100 * 2**20
    assert not planning.run("nemotron-nano-12b-v2", "19.66GiB", 131_072, bandwidth="600GB/s").fits


def test_folder(tmp_path: Path) -> None:
    config = replace(preset("hybrid-tiny"), tie_embeddings=False)
    LanguageModel(config).initialise(0).save(tmp_path / "model")
    made = planning.run(str(tmp_path / "model"), "1GB", 64, bandwidth="1GB/s", dtype="float32", batch=2)
    assert made == replace(
        planning.plan(config, memory=10**9, context=64, batch=2, dtype="float32", bandwidth=1e9), model=made.model
    )


def test_recipe(tmp_path: Path) -> None:
    pages = tmp_path / "pages.warc"
    pages.touch()
    (tmp_path / "small.yaml").write_text(RECIPE.format(pages=pages))
    assert planning.find(str(tmp_path / "small.yaml")) == replace(preset("hybrid-tiny"), vocab_size=777, hidden_size=96)
    (tmp_path / "pages.yaml").write_text(f"stages: {{documents: {{stage: data, inputs: {{pages: {pages}}}}}}}")
    with pytest.raises(UserError, match="no stage pretrain"):
        planning.find(str(tmp_path / "pages.yaml"))


def test_bandwidth_is_measured_where_none_is_given() -> None:
    made = planning.run("hybrid-tiny", "1GiB", 64)
    assert made.bandwidth == machine.bandwidth(planning._device())


@pytest.mark.parametrize(
    ("model", "memory", "context", "rest", "message"),
    [
        ("nemotron-nano-9b", "22GiB", 64, {}, "nemotron-nano-9b-v2"),
        ("smollm", "22GiB", 64, {}, "smollm2"),
        ("missing.yaml", "22GiB", 64, {}, "missing.yaml does not exist"),
        ("qwen3-8b", "22GB?", 64, {}, r"memory is '22GB\?'; set memory to"),
        ("qwen3-8b", "22", 64, {}, "set memory to 22GiB"),
        ("qwen3-8b", "22GiB", 0, {}, "context is 0; set context to"),
        ("qwen3-8b", "22GiB", 64, {"bandwidth": "fast"}, "set bandwidth to a rate"),
        ("qwen3-8b", "22GiB", 64, {"peak": "fast"}, "set peak to a rate"),
        ("qwen3-8b", "22GiB", 64, {"dtype": "int5"}, "dtype is 'int5'"),
    ],
)
def test_nonsense_has_a_way_out(model: str, memory: str, context: int, rest: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planning.run(model, memory, context, **{"bandwidth": "1GB/s"} | rest)  # type: ignore[arg-type]
