"""DPO and RPO: losses by hand, the sign of the margin, a reference that stays where it was."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_world import LOOP, lines, network, vocabulary, write

from whimbrel import config
from whimbrel.align.preference import Pairs, Preference, PreferenceSettings, dpo, log_probs, read_pairs, reference, rpo
from whimbrel.align.preference import run as tune
from whimbrel.errors import UserError
from whimbrel.events import silent
from whimbrel.model import LanguageModel
from whimbrel.train.step import accumulate

ROWS = [
    {"prompt": "What is 7-2?", "chosen": "5", "rejected": "15 or so"},
    {"prompt": [{"role": "user", "content": "What is 1+1?"}], "chosen": "2", "rejected": "3", "rejected_reward": -0.5},
    {"prompt": "What is 9-9?", "chosen": "0", "rejected": "9", "chosen_reward": 4, "rejected_reward": 1},
]


def test_losses_by_hand() -> None:
    margin, gap = torch.tensor([0.0, 2.0, -2.0]), torch.tensor([0.0, 0.0, 2.0])
    assert dpo(margin).tolist() == pytest.approx([log(2), log(1 + exp(-2)), log(1 + exp(2))])
    s = 1 / (1 + exp(-2))  # heads of a coin at 2
    wanted = [0.0, 0.5 * log(0.5 / s) + 0.5 * log(0.5 / (1 - s)), s * log(s / (1 - s)) + (1 - s) * log((1 - s) / s)]
    assert rpo(margin, gap).tolist() == pytest.approx(wanted, abs=1e-7)
    torch.testing.assert_close(rpo(margin, torch.full((3,), 60.0)), dpo(margin))


def test_rpo_pulls_towards_the_gap_and_dpo_always_up() -> None:
    margin = torch.tensor([1.0, 1.0, 3.0], requires_grad=True)
    rpo(margin, torch.tensor([1.0, 2.0, 2.0])).sum().backward()
    assert margin.grad is not None
    assert margin.grad.tolist() == pytest.approx([0, -0.1497384, 0.0717772], abs=1e-6)  # sigmoid(a) - sigmoid(b)
    margin.grad = None
    dpo(margin).sum().backward()
    assert (margin.grad < 0).all()


def encoded() -> Pairs:
    return read_pairs(ROWS, vocabulary())


def test_rewards_default_to_one_and_zero() -> None:
    assert encoded().gap_P.tolist() == [1.0, 1.5, 3.0]


def test_log_probs_sum_over_the_answer_alone() -> None:
    """Prompt tokens count nothing; packed = separate; the end of the turn is part of the answer."""
    model, pairs, tokenizer = network(), encoded(), vocabulary()
    sums_P2, tokens_P2 = log_probs(model, pairs.of(np.arange(3)))
    for number, row in enumerate(ROWS):
        for side, name in enumerate(("chosen", "rejected")):
            asked: Any = row["prompt"]
            asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            start, _ = tokenizer.encode_chat(asked, thinking=False, generation=True)
            end = tokenizer.encode(f"{row[name]}\n<SPECIAL_12>")
            logp_LV = model(torch.tensor([[*start, *end]]))[0].log_softmax(-1)
            wanted = sum(logp_LV[len(start) - 1 + i, token].item() for i, token in enumerate(end))
            assert sums_P2[number, side].item() == pytest.approx(wanted, abs=1e-4)
            assert tokens_P2[number, side] == len(end)


def test_terms_by_hand() -> None:
    """Margin = beta ((chosen - its reference) - (rejected - its reference)); the SFT term is a mean over tokens."""
    model, pairs = network(), encoded()
    with torch.no_grad():
        sums_P2, tokens_P2 = log_probs(model, pairs.of(np.arange(3)))
    away = np.asarray([[3.0, 1.0], [-1.0, 1.0], [0.5, 0.25]], np.float32)  # policy - reference
    pairs = replace(pairs, reference_P2=sums_P2.numpy() - away)
    margins = 0.5 * (away[:, 0] - away[:, 1])
    loss, terms = accumulate(model, Preference("dpo", 0.5, 1.0, 0.01), [pairs.of(np.arange(3))], learn=False)
    assert terms["margin"] == pytest.approx(margins.mean(), abs=1e-5)
    assert terms["accuracy"] == pytest.approx(2 / 3)
    assert terms["preference"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-5)
    assert terms["sft"] == pytest.approx(-float(sums_P2[:, 0].sum() / tokens_P2[:, 0].sum()), rel=1e-5)
    assert loss == pytest.approx(terms["preference"] + 0.01 * terms["sft"], rel=1e-6)
    scaled = Preference("rpo", 0.5, 2.0, 0.0)
    _, terms = accumulate(model, scaled, [pairs.of(np.arange(2)), pairs.of(np.arange(2, 3))], learn=False)
    wanted = rpo(torch.from_numpy(margins), 2.0 * torch.tensor([1.0, 1.5, 3.0]))
    assert terms["preference"] == pytest.approx(wanted.mean().item(), abs=1e-5)


def test_the_reference_is_written_once_and_frozen(tmp_path: Path) -> None:
    model, pairs = network(), encoded()
    first = reference(pairs, model, 2, tmp_path / "reference.npy")
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    assert np.array_equal(reference(pairs, model, 2, tmp_path / "reference.npy"), first)
    assert not np.allclose(reference(pairs, model, 2, tmp_path / "anew.npy"), first)


@pytest.mark.parametrize("loss", ["dpo", "rpo"])
def test_the_stage_moves_apart_what_is_chosen_and_rejected(tmp_path: Path, world: dict[str, Path], loss: str) -> None:
    rows = [{"prompt": f"What is {n}+0?", "chosen": "yes", "rejected": "no"} for n in range(1, 17)]
    inputs = {"model": world["model"], "pairs": write(tmp_path / "pairs.jsonl", rows)}
    said = {"loss": loss, "beta": 0.5, "pairs": 4, "heldout": 0.25, "device": "cpu", "train": LOOP | {"steps": 6}}
    figures = tune(config.parse(PreferenceSettings, said), inputs, tmp_path / "out", silent)
    assert figures["pairs"] == 12
    margins = lines(tmp_path / "out", "margin")
    assert margins[0] == pytest.approx(0, abs=1e-5)  # the policy starts as its own reference
    assert margins[-1] > 0.1 and lines(tmp_path / "out", "accuracy")[-1] > 0.5
    start, end = np.load(tmp_path / "out" / "reference.npy"), LanguageModel.load(tmp_path / "out" / "model")
    anew = log_probs(LanguageModel.load(world["model"]), read_pairs(rows, vocabulary()).of(np.arange(16)))[0]
    assert start == pytest.approx(anew.detach().numpy(), abs=1e-4)
    moved = log_probs(end, read_pairs(rows, vocabulary()).of(np.arange(16)))[0].detach().numpy() - start
    assert (moved[:, 0] - moved[:, 1]).mean() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "ipo"}, "set loss to dpo or rpo"),
        ({"beta": 0}, "beta is 0.0; set beta above 0"),
        ({"reward_scale": -1.0}, "reward_scale is -1.0"),
        ({"sft": -1}, "sft is -1"),
        ({"pairs": 0}, "set pairs to 1 or more"),
        ({"heldout": 1.5}, "heldout is 1.5; set heldout between 0 and 1"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.parse(PreferenceSettings, changes)
