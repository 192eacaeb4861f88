"""Loss on text by position: equal to what each window gives alone, masks and documents respected."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from whimbrel.data import documents, shards
from whimbrel.errors import UserError
from whimbrel.evaluate.loss import LossSettings, by_position
from whimbrel.evaluate.statistics import mean
from whimbrel.events import silent
from whimbrel.model import LanguageModel, ModelConfig
from whimbrel.text import Tokenizer

VOCABULARY = 320
CONFIG = ModelConfig(
    pattern="M*-",
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=1,
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    model = LanguageModel(CONFIG).initialise(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


@torch.inference_mode()
def losses(model: LanguageModel, window: list[int]) -> list[float]:
    """-log p of every token but the first, from one plain pass."""
    logprobs_LV = model(torch.tensor([window]))[0].double().log_softmax(-1)
    return [-logprobs_LV[place, token].item() for place, token in enumerate(window[1:])]


def test_windows_positions_masks_and_documents(model: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = [draw.integers(64, VOCABULARY, size).tolist() for size in (25, 9, 16)]  # windows of 8: 3, 1, 2
    learn = [np.ones(len(row), bool) for row in rows]
    learn[0][10:14] = False
    shards.write(
        tmp_path / "held", [shards.Tokens(row, mask, {}) for row, mask in zip(rows, learn, strict=True)], VOCABULARY
    )
    found = by_position(model, tokenizer, LossSettings(path="held", length=8, bins=2), tmp_path, silent)
    expected: list[list[list[float]]] = []  # document, window, token
    for row, mask in zip(rows, learn, strict=True):
        cut = [(row[at : at + 8], mask[at + 1 : at + 8]) for at in range(0, len(row) - 7, 8)]
        expected.append([np.where(keep, losses(model, window), np.nan).tolist() for window, keep in cut])
    flat = [[value for window in one for value in window if not math.isnan(value)] for one in expected]
    assert found["loss"] == pytest.approx(mean(flat), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]["mean"]))
    assert (found["windows"], found["documents"], found["tokens"]) == (6, 3, 6 * 7 - 4)
    first, second = found["positions"]
    assert (first["from"], first["to"], second["from"], second["to"]) == (1, 4, 5, 7)
    early = [[value for window in one for value in window[:4] if not math.isnan(value)] for one in expected]
    assert {name: first[name] for name in ("mean", "low", "high")} == pytest.approx(mean(early), rel=1e-5)
    fewer = by_position(model, tokenizer, LossSettings(path="held", length=8, windows=4), tmp_path, silent)
    assert (fewer["windows"], fewer["documents"]) == (4, 2)


def test_texts_and_parquet_are_read(model: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "the whimbrel crosses an ocean without landing"
    (tmp_path / "plain.txt").write_text(text)
    with documents.writing(tmp_path / "documents.parquet", documents.DOCUMENTS) as table:
        table.add({"id": "1", "text": text, "source": "us", "license": "MIT", "characters": len(text)})
    settings = LossSettings(length=20)
    plain = by_position(model, tokenizer, settings, tmp_path / "plain.txt", silent)
    assert plain["loss"] == by_position(model, tokenizer, settings, tmp_path / "documents.parquet", silent)["loss"]
    ids = tokenizer.encode(text)
    windows = [losses(model, ids[at : at + 20]) for at in (0, 20)]
    assert plain["loss"] == pytest.approx(mean(windows), rel=1e-5)  # one document: by window
    with pytest.raises(UserError, match=r"text\.length is 64, and no document .* is as long"):
        by_position(model, tokenizer, LossSettings(length=64), tmp_path / "plain.txt", silent)
    with pytest.raises(UserError, match=r"text\.path leads to .*other"):
        by_position(model, tokenizer, LossSettings(path="other"), tmp_path, silent)


def test_a_model_that_knows_nothing_loses_the_same_everywhere(tokenizer: Tokenizer, tmp_path: Path) -> None:
    blank = LanguageModel(CONFIG).initialise(0)
    with torch.no_grad():
        blank.head.weight.zero_()
    (tmp_path / "text").write_text("a" * 640)
    found = by_position(blank, tokenizer, LossSettings(length=64, bins=4), tmp_path / "text", silent)
    assert [part["mean"] for part in found["positions"]] == pytest.approx([math.log(VOCABULARY)] * 4)
