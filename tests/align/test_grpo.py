"""GRPO: which answers are learned from, what stops a run, a reference that stays, and a reward that rises."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_world import LOOP, lines, write

from whimbrel import config
from whimbrel.align import grpo
from whimbrel.align.grpo import GrpoSettings, Trainer, draw
from whimbrel.align.policy import PolicyGradient, advantages
from whimbrel.align.rollout import pack, reward
from whimbrel.align.tuning import load
from whimbrel.engine import Engine
from whimbrel.errors import UserError
from whimbrel.events import silent
from whimbrel.model import LanguageModel
from whimbrel.train.step import accumulate, train_step

SMALL = {"groups": 24, "group_size": 6, "max_tokens": 40, "device": "cpu"}


def settings(**changes: Any) -> GrpoSettings:
    train = LOOP | {"steps": 4, "optimizer": {"learning_rate": 2e-3, "weight_decay": 0.0}} | changes.pop("train", {})
    return config.parse(GrpoSettings, SMALL | changes | {"train": train})


@pytest.fixture
def rows(taught: dict[str, Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in taught["prompts"].read_text().splitlines()]


@pytest.fixture
def trainer(taught: dict[str, Path]) -> Callable[..., Trainer]:
    """A trainer of the taught model, with the reference that its settings ask for."""

    def make(**changes: Any) -> Trainer:
        said = settings(**changes)
        model, tokenizer = load(taught["model"], torch.device("cpu"))
        frozen = load(taught["model"], torch.device("cpu"))[0].requires_grad_(False) if said.kl != "none" else None
        return Trainer(said, model, tokenizer, frozen)

    return make


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def drawn(said: GrpoSettings, engine: Engine, rows: list[dict[str, Any]], step: int) -> list[list[Any]]:
    """All the groups of a step, in the order of its prompts, drawn once more without `draw`."""
    first = step * said.groups
    numbers = grpo.Permutation(len(rows), said.seed)(np.arange(first, first + said.groups)).tolist()
    asked = [said.sampling((said.seed << 40) + first + i, True) for i in range(said.groups)]
    found = list(engine.generate([rows[number]["prompt"] for number in numbers], asked))
    size = said.group_size
    return [[(rows[n], a) for a in found[i * size : (i + 1) * size]] for i, n in enumerate(numbers)]


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_groups_are_compared_inside_and_dropped_without_variance(
    trainer: Callable[..., Trainer], rows: list[dict[str, Any]], leave_one_out: bool
) -> None:
    """Each answer's gain is that of its own group's rewards; figures count what was dropped, too."""
    said, engine = settings(leave_one_out=leave_one_out), trainer().engine
    groups, figures = draw(said, 0, rows, engine)
    every = drawn(said, engine, rows, 0)
    rewards = [[reward(row, answer) for row, answer in group] for group in every]
    mixed = [number for number, gains in enumerate(rewards) if 0 < sum(gains) < said.group_size]
    assert 0 < len(mixed) < said.groups, "the drawing has nothing to show"
    assert len(groups) == len(mixed) and figures["groups_kept"] == len(mixed) / said.groups
    assert figures["reward"] == pytest.approx(np.mean(rewards))
    for group, number in zip(groups, mixed, strict=True):
        gains = advantages(rewards[number], leave_one_out, False)
        assert gains is not None
        kept = [(a.ids, gain) for (_, a), gain in zip(every[number], gains, strict=True) if a.finish != "length"]
        assert [(sample.answer.ids, sample.advantage) for sample in group] == kept
    assert figures["answer_tokens"] == np.mean([len(answer.ids) for group in every for _, answer in group])


def test_answers_that_were_cut_are_masked_but_count_in_their_group(
    trainer: Callable[..., Trainer], rows: list[dict[str, Any]]
) -> None:
    said, engine = settings(max_tokens=27), trainer().engine
    masked, figures = draw(said, 0, rows, engine)
    whole, _ = draw(replace(said, learn_cut=True), 0, rows, engine)
    assert 0 < figures["cut"] < 1
    for some, every in zip(masked, whole, strict=True):
        assert len(every) == said.group_size
        assert sum(sample.advantage for sample in every) == pytest.approx(0, abs=1e-9)
        kept = [sample for sample in every if sample.answer.finish != "length"]
        assert [(one.answer.ids, one.advantage) for one in some] == [(one.answer.ids, one.advantage) for one in kept]
    assert sum(map(len, masked)) < sum(map(len, whole))


def test_what_the_engine_wrote_to_close_a_thought_is_not_learned(
    trainer: Callable[..., Trainer], rows: list[dict[str, Any]]
) -> None:
    groups, _ = draw(settings(thinking_budget=4, thinking_grace=2), 0, rows, trainer().engine)
    samples = [sample for group in groups for sample in group]
    closed = [sample.answer for sample in samples if sample.answer.forced]
    assert closed and all(answer.thinking_ended in ("budget", "grace") for answer in closed)
    learned = sum(len(sample.answer.ids) - len(sample.answer.forced) for sample in samples)
    assert sum(len(batch.targets_R) for batch in pack(samples, 500)) == learned


def test_a_share_of_the_prompts_is_answered_without_thought(
    trainer: Callable[..., Trainer], rows: list[dict[str, Any]]
) -> None:
    engine = trainer().engine
    for off in (0.0, 0.4, 1.0):
        _, figures = draw(settings(off=off), 0, rows, engine)
        assert (figures["thinking_tokens"] == 0) == (off == 1)
    groups, _ = draw(settings(off=0.4), 0, rows, engine)
    ended = {answer.thinking_ended == "off" for group in groups for answer in (sample.answer for sample in group)}
    assert ended == {True, False}
    for group in groups:
        assert len({sample.answer.thinking_ended == "off" for sample in group}) == 1


def test_a_step_draws_the_same_and_an_epoch_asks_everything_once(
    trainer: Callable[..., Trainer], rows: list[dict[str, Any]]
) -> None:
    said, engine = settings(groups=6, learn_cut=True), trainer().engine
    first, again, other = (draw(said, step, rows, engine)[0] for step in (0, 0, 1))
    assert [[s.answer.ids for s in group] for group in first] == [[s.answer.ids for s in group] for group in again]
    assert [group[0].prompt for group in first] != [group[0].prompt for group in other]
    asked = [rows[n]["prompt"][0]["content"] for step in range(4)
             for n in grpo.Permutation(len(rows), said.seed)(np.arange(step * 6, step * 6 + 6)).tolist()]  # fmt: skip
    assert sorted(asked) == sorted(row["prompt"][0]["content"] for row in rows)


def test_engine_and_trainer_agree_on_what_was_drawn(
    trainer: Callable[..., Trainer], rows: list[dict[str, Any]]
) -> None:
    """In float32, prefill and decode against one packed pass: 1e-3 is ten times what rounding makes of it."""
    made = trainer()
    for step in range(3):  # after updates, too: no cached state outlives them
        figures = made.step(step, rows)
        assert 0 < figures["drift_max"] < 1e-3


def test_a_sampler_that_is_another_model_stops_the_run_before_it_learns(
    trainer: Callable[..., Trainer], rows: list[dict[str, Any]]
) -> None:
    made = trainer()
    stale, _ = made.model, made.step(0, rows)
    made.engine = trainer().engine  # draws with the weights of before
    with torch.no_grad():
        stale.norm_f.weight.mul_(1.5)
    stale.touch()
    before = weights(stale)
    with pytest.raises(UserError, match=r"drift_mean is 0\.\d+, its limit 0\.05: the engine no longer draws"):
        made.step(1, rows)
    assert all(torch.equal(weight, before[name]) for name, weight in stale.named_parameters())
    made.settings = replace(made.settings, drift_mean=100.0)
    with pytest.raises(UserError, match=r"drift_max is .*, its limit 1: "):
        made.step(1, rows)
    made.settings = replace(made.settings, drift_max=100.0)
    assert made.step(1, rows)["drift_max"] > 1


def test_drift_by_hand(trainer: Callable[..., Trainer], rows: list[dict[str, Any]]) -> None:
    """Mean and largest over all tokens of the step; what is not a number is beyond every limit."""
    made = trainer()
    groups, _ = draw(made.settings, 0, rows, made.engine)
    batches = [made.score(batch) for batch in pack([sample for group in groups for sample in group], 200)]
    assert len(batches) > 1
    moved = []
    for number, batch in enumerate(batches):
        assert batch.old_R is not None
        moved.append(replace(batch, sampler_R=batch.old_R + np.float32(-0.01 if number else 0.03)))
    first, rest = len(moved[0].targets_R), sum(len(batch.targets_R) for batch in moved[1:])
    found = made.drift(moved)
    assert found["drift_mean"] == pytest.approx((0.03 * first + 0.01 * rest) / (first + rest), rel=1e-3)
    assert found["drift_max"] == pytest.approx(0.03, rel=1e-3)
    assert made.drift([]) == {"drift_mean": 0.0, "drift_max": 0.0}
    moved[0].sampler_R[0] = np.nan
    with pytest.raises(UserError, match="drift_mean is nan"):
        made.drift(moved)


def test_the_reference_is_frozen_and_the_divergence_from_it_grows(
    trainer: Callable[..., Trainer], rows: list[dict[str, Any]]
) -> None:
    made = trainer(kl="k3")
    assert made.reference is not None
    start = weights(made.reference)
    seen = [made.step(step, rows)["kl"] for step in range(3)]
    assert seen[0] == pytest.approx(0, abs=1e-7)  # the policy starts as its own reference
    assert seen[-1] > 1e-5
    assert all(torch.equal(weight, start[name]) for name, weight in made.reference.named_parameters())
    assert any(not torch.equal(weight, start[name]) for name, weight in made.model.named_parameters())


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_the_divergence_pulls_back(trainer: Callable[..., Trainer], rows: list[dict[str, Any]], kind: str) -> None:
    """A step along the loss of a batch without gains brings the policy closer to its reference, not further away."""
    made = trainer(kl=kind)
    groups, _ = draw(made.settings, 0, rows, made.engine)
    (batch,) = pack([replace(sample, advantage=0.0) for group in groups for sample in group], 10**6)
    with torch.no_grad():
        for number, parameter in enumerate(made.model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    batch = made.score(batch)
    objective = PolicyGradient(0.2, 0.28, kind, 1.0)
    before, _ = accumulate(made.model, objective, [batch], learn=True)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad)
    after, terms = accumulate(made.model, objective, [batch], learn=False)
    assert before > 0.001 and after < 0.99 * before and terms["policy"] == pytest.approx(0, abs=1e-7)


def test_several_updates_of_a_step_share_what_was_drawn(
    trainer: Callable[..., Trainer], rows: list[dict[str, Any]]
) -> None:
    """Ratios are taken to the policy that drew: the second update sees one that has moved."""
    one, two = trainer(), trainer(updates=2, train={"optimizer": {"learning_rate": 0.05}})
    assert one.step(0, rows)["clipped"] == 0
    assert two.step(0, rows)["clipped"] > 0
    moved = [sum(group["step"].item() for group in made.optimizer.state.values()) for made in (one, two)]
    assert moved[1] == 2 * moved[0]


def test_every_sample_is_learned_in_one_update_of_its_step(
    trainer: Callable[..., Trainer], rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, learned = trainer(updates=2), []

    def watched(model: LanguageModel, objective: Any, batches: list[Any], *rest: Any, **how: Any) -> Any:
        learned.append(sum(len(batch.targets_R) for batch in batches))
        return train_step(model, objective, batches, *rest, **how)

    monkeypatch.setattr(grpo, "train_step", watched)
    groups, _ = draw(made.settings, 0, rows, made.engine)
    made.step(0, rows)
    assert len(learned) == 2 and min(learned) > 0
    assert sum(learned) == sum(len(sample.learned()) for group in groups for sample in group)


def test_no_two_prompts_of_a_run_or_of_another_seed_are_drawn_with_the_same_numbers(
    trainer: Callable[..., Trainer], rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said, engine, seeds = settings(groups=3, group_size=2), trainer().engine, list[int]()
    generate = engine.generate

    def watched(prompts: Any, sampling: list[Any]) -> Any:
        seeds.extend(one.seed for one in sampling)
        return generate(prompts, sampling)

    monkeypatch.setattr(engine, "generate", watched)
    for how, step in ((said, 0), (said, 1), (replace(said, seed=1), 0)):
        draw(how, step, rows, engine)
    assert len(seeds) == len(set(seeds)) == 9


def test_the_engine_takes_no_more_than_the_longest_prompt_needs(
    trainer: Callable[..., Trainer], rows: list[dict[str, Any]]
) -> None:
    """In every slot; and the same answers are drawn."""
    plain, made = trainer(), trainer()
    grpo.limit(made.engine, rows, 40)
    prompts = [len(grpo.read_prompt(row["prompt"], made.engine.tokenizer, True, 320)[0]) for row in rows]
    assert made.engine.kv_tokens is not None and made.engine.kv_tokens % (24 * 6 * 16) == 0
    assert 0 <= made.engine.kv_tokens // (24 * 6) - max(prompts) - 40 < 32
    answers = [[s.answer.ids for group in draw(one.settings, 0, rows, one.engine)[0] for s in group]
               for one in (plain, made)]  # fmt: skip
    assert answers[0] == answers[1] and answers[0]


def test_a_right_answer_that_was_cut_earns_nothing(trainer: Callable[..., Trainer], rows: list[dict[str, Any]]) -> None:
    groups = drawn(settings(), trainer().engine, rows, 0)
    right = [(row, answer) for group in groups for row, answer in group if reward(row, answer) == 1.0]
    assert right
    assert {reward(row, replace(answer, finish="length")) for row, answer in right} == {0.0}


def test_the_stage_makes_right_answers_likelier(taught: dict[str, Path], tmp_path: Path) -> None:
    """Every answer is to be 1, and no thought is asked for: the reward rises from chance to nearly all."""
    asked = [json.loads(line) | {"answer": "1"} for line in taught["prompts"].read_text().splitlines()]
    inputs = {"model": taught["model"], "prompts": write(tmp_path / "prompts.jsonl", asked)}
    said = settings(off=1.0, max_tokens=10, train={"steps": 20, "optimizer": {"learning_rate": 5e-3}})
    figures = grpo.run(said, inputs | {"validation": inputs["prompts"]}, tmp_path, silent)
    rewards = lines(tmp_path, "reward")
    assert rewards[0] < 0.3 and rewards[-1] > 0.8
    assert lines(tmp_path, "accuracy_off")[0] < 0.3 and figures["accuracy_off"] > 0.8
    assert max(lines(tmp_path, "drift_max")) < 1e-3 and len(lines(tmp_path, "drift_mean")) == 20
    before, after = LanguageModel.load(taught["model"]), LanguageModel.load(tmp_path / "model")
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_a_step_without_anything_to_learn_leaves_the_weights(
    world: dict[str, Path], trainer: Callable[..., Trainer], rows: list[dict[str, Any]]
) -> None:
    made = trainer()
    before = weights(made.model)
    figures = made.step(0, [row | {"answer": "never"} for row in rows])
    assert figures["groups_kept"] == figures["reward"] == 0 and "loss" not in figures
    assert all(torch.equal(weight, before[name]) for name, weight in made.model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size is 1, with nothing to compare; set group_size to 2"),
        ({"groups": 0}, "set groups to 1 or more"),
        ({"updates": 25}, "updates is 25, more than groups 24"),
        ({"clip_low": 1.0}, "clip_low is 1.0"),
        ({"clip_high": 0.0}, "clip_high 0.0; set them to 0.2 and 0.28"),
        ({"kl": "k4"}, "kl is 'k4'"),
        ({"kl_coefficient": 0.1}, "nothing is measured; set kl to k3"),
        ({"kl": "k1", "kl_coefficient": 0.1}, "the gradient of k1 is 0 in the mean; set kl to k3"),
        ({"kl": "k3", "kl_coefficient": -0.1}, "kl_coefficient is -0.1"),
        ({"thinking_budget": 0}, "leave it at null and set off to 1"),
        ({"off": 1.5}, "set off between 0 and 1"),
        ({"micro_tokens": 0}, "set micro_tokens to 1 or more"),
        ({"train": {"accumulate": 2}}, "set micro_tokens lower instead"),
        ({"train": {"recompute": True}}, "set micro_tokens lower instead"),
        ({"device": "gpu"}, "set device to auto, cpu or cuda"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**changes)
