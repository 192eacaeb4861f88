"""The reward model: squared error over what is rated, the order of answers, and the same figures from its folder."""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_world import LOOP, lines, network, vocabulary, write
from torch import nn

from whimbrel import config
from whimbrel.align.reward import (
    HELPSTEER,
    RatedBatch,
    Regression,
    RewardModel,
    RewardSettings,
    agreement,
    attach,
    predict,
    read_ratings,
)
from whimbrel.align.reward import run as tune
from whimbrel.errors import UserError
from whimbrel.events import silent
from whimbrel.train.step import accumulate


def rated(answer: str, **attributes: float) -> dict[str, Any]:
    talk = [{"role": "user", "content": "Sing"}, {"role": "assistant", "content": answer}]
    return {"messages": talk, "attributes": attributes}


def test_the_loss_by_hand() -> None:
    """Mean squared distance over the labels there are, counted over all micro-batches."""
    model = attach(network(), 2)
    head = model.get_submodule("reward")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([1.0, 3.0]))  # whatever the text
    tokens, lengths = np.arange(5), (2, 3)
    first = RatedBatch(tokens, lengths, np.asarray([[2, nan], [nan, nan]], np.float32))
    second = RatedBatch(tokens, lengths, np.asarray([[4, 1], [1, nan]], np.float32))
    loss, _ = accumulate(model, Regression(), [first, second], learn=True)
    assert loss == pytest.approx((1 + 9 + 4 + 0) / 4)
    assert head.bias.grad is not None
    assert head.bias.grad.tolist() == pytest.approx([2 * (-1 - 3) / 4, 2 * 2 / 4])  # 2 (predicted - label) / 4


def test_attributes_are_read_at_the_last_token_of_each_text() -> None:
    model = attach(network(), 3)
    with torch.no_grad():
        model.get_submodule("reward").weight.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr,operator]
    tokens, lengths = np.arange(3, 14), (4, 7)
    found = predict(model, RatedBatch(tokens, lengths, np.zeros((2, 3), np.float32)))
    for text, row in zip((tokens[:4], tokens[4:]), found, strict=True):
        alone = predict(model, RatedBatch(text, (len(text),), np.zeros((1, 3), np.float32)))
        torch.testing.assert_close(row, alone[0], atol=1e-5, rtol=1e-5)


def test_what_is_missing_or_minus_100_is_not_rated() -> None:
    settings = RewardSettings(weights={"a": 1.0, "b": 1.0})
    ratings = read_ratings([rated("x", b=3.0), rated("y", a=-100, b=0.0)], vocabulary(), settings)
    assert np.array_equal(ratings.labels_SA, np.asarray([[nan, 3], [nan, 0]], np.float32), equal_nan=True)


def test_agreement_counts_couples_in_the_right_order() -> None:
    assert agreement(np.asarray([0.1, 0.2, 0.3]), np.asarray([0, 1, 2])) == 1
    assert agreement(np.asarray([0.3, 0.2, 0.1]), np.asarray([0, 1, 2])) == 0
    assert agreement(np.asarray([0.1, 0.3, 0.2, 0.9]), np.asarray([0, 1, 2, nan])) == pytest.approx(2 / 3)
    assert np.isnan(agreement(np.asarray([1.0, 2.0]), np.asarray([3.0, 3.0])))


def test_the_stage_learns_to_tell_answers_apart(world: dict[str, Path], tmp_path: Path) -> None:
    """And its folder, read again, says the same; a reward is the weighted sum."""
    draw = np.random.default_rng(0)
    rows = [rated("la" * int(n) + ("!" if n % 2 else "."), joy=4.0 * (n % 2)) for n in draw.integers(1, 9, 80)]
    inputs = {"model": world["model"], "rated": write(tmp_path / "rated.jsonl", rows)}
    said = {"weights": {"joy": -0.5, "depth": 1.0}, "conversations": 8, "heldout": 0.2, "device": "cpu"}
    figures = tune(config.parse(RewardSettings, said | {"train": LOOP | {"steps": 40}}), inputs, tmp_path, silent)
    assert figures["agreement_joy"] > 0.9 and "agreement_depth" not in figures  # never rated
    assert lines(tmp_path, "loss")[-1] < 0.5 * lines(tmp_path, "loss")[0]
    judge = RewardModel(tmp_path)
    told = [rated("la!")["messages"], rated("la.")["messages"], rated("lalala!")["messages"]]
    attributes_SA = judge.attributes(told)
    assert attributes_SA[0, 0] > attributes_SA[1, 0] + 1
    assert judge.rewards(told) == pytest.approx(-0.5 * attributes_SA[:, 0] + attributes_SA[:, 1], abs=1e-6)


def test_settings() -> None:
    assert list(RewardSettings().weights) == list(HELPSTEER)
    with pytest.raises(UserError, match="weights is empty"):
        RewardSettings(weights={})
    with pytest.raises(UserError, match="set conversations to 1"):
        RewardSettings(conversations=0)
