"""What training takes and how long: held to what is built, and to steps that were published."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_run import CONFIG, tiny_model

from whimbrel.engine.pool import Pool
from whimbrel.errors import UserError
from whimbrel.model.presets import PRESETS
from whimbrel.parallel import Axes
from whimbrel.train.memory import training_bytes
from whimbrel.train.plan import TrainingPlan, TrainingPlanSettings, held_bytes, plan

H100 = 989e12
GIB = 2**30


def planned(name: str, length: int = 4096, rows: int = 1, memory: int = 80 * GIB, **settings: Any) -> TrainingPlan:
    asked = TrainingPlanSettings(**settings)
    return plan(PRESETS[name], asked, length=length, rows=rows, memory=memory, peak=H100, name=name)


@pytest.mark.parametrize(
    ("name", "batch", "copies", "mfu", "seconds"),
    [
        ("nemotron-4-15b", 384, 96, 0.343, 0.57),
        ("nemotron-4-15b", 768, 192, 0.333, 0.58),
        ("nemotron-4-15b", 1152, 288, 0.305, 0.64),
        ("nemotron-4-340b", 768, 16 * 12, 0.424, 10.3),
        ("nemotron-4-340b", 1536, 32 * 12, 0.423, 10.3),
        ("nemotron-4-340b", 2304, 64 * 12, 0.410, 8.0),
    ],
)
def test_published_steps_follow_from_published_mfu(
    name: str, batch: int, copies: int, mfu: float, seconds: float
) -> None:
    """arXiv 2402.16819, table 2, and 2406.11704, table 2; within 1 %: they print two digits, and count attention over
    the whole row. 12 stages of a pipeline stand here as 12 times the copies, which is the same arithmetic.
    """
    made = planned(name, accumulate=batch, mfu=mfu, causal=False, parallel=Axes(data=copies, tensor=8))
    assert made.step_seconds == pytest.approx(seconds, rel=0.01)
    assert made.tokens_per_second == pytest.approx(batch * 4096 / made.step_seconds)


def test_published_operations_of_the_12b() -> None:
    """1.45e24 for 20T tokens (the model card of Nemotron-Nano-12B-v2-Base), within 2 %."""
    made = planned("nemotron-nano-12b-v2", 8192, tokens=20e12, causal=False)
    assert made.run_flops == pytest.approx(1.45e24, rel=0.02)
    assert made.days is not None and made.days * 86_400 * made.mfu * H100 == pytest.approx(made.run_flops)


def test_alone_it_is_what_training_estimates() -> None:
    model = tiny_model()
    for recompute in (False, True):
        wanted = training_bytes(model, (64, 64), "float32", recompute)
        asked = TrainingPlanSettings(recompute=recompute)
        made = plan(CONFIG, asked, length=64, rows=2, memory=GIB, peak=1e12, precision="float32")
        assert (made.weights_bytes, made.gradients_bytes, made.moments_bytes, made.activation_bytes) == tuple(
            wanted.values()
        )
        assert made.total_bytes == sum(wanted.values()) + made.logits_bytes and made.fits


def test_axes_divide_what_they_cut() -> None:
    config = PRESETS["nemotron-nano-9b-v2"]
    whole, largest = held_bytes(config, Axes())
    assert held_bytes(config, Axes(data=4, context=2)) == (whole, largest)
    cut, smaller = held_bytes(config, Axes(tensor=8))
    norms = 4 * (config.layers + 1) * config.hidden_size
    assert cut == (whole - norms) // 8 + norms and smaller == largest // 8
    assert math.isclose(held_bytes(config, Axes(fsdp=16, tensor=8))[0], cut / 16, rel_tol=1e-3)
    shared = planned("nemotron-nano-9b-v2", 8192, parallel=Axes(context=2))
    alone = planned("nemotron-nano-9b-v2", 8192)
    assert shared.activation_bytes < 0.51 * alone.activation_bytes
    assert not planned("nemotron-nano-9b-v2", 8192, recompute=True).fits
    assert planned("nemotron-nano-9b-v2", 8192, recompute=True, accumulate=8, parallel=Axes(fsdp=8)).fits


def test_the_plan_for_people_says_what_is_assumed() -> None:
    text = "\n".join(planned("nemotron-nano-9b-v2", 8192, tokens=1e12, recompute=True).lines())
    for words in ("8.888B parameters", "at 35.0% of 989 TFLOP/s", "does not fit", "without recompute", "days"):
        assert words in text


def test_stages_differ_in_what_lies_beside_the_model() -> None:
    """DPO keeps no reference, a reward model has no logits, GRPO has an engine's states and perhaps a reference."""
    alone = plan(CONFIG, TrainingPlanSettings(), length=40, rows=2, memory=GIB, peak=1e12)

    def beside(**settings: Any) -> TrainingPlan:
        return plan(CONFIG, TrainingPlanSettings(**settings), length=40, rows=2, memory=GIB, peak=1e12)

    assert beside(stage="sft").total_bytes == beside(stage="dpo").total_bytes == alone.total_bytes
    assert beside(stage="reward").total_bytes == alone.total_bytes - alone.logits_bytes
    drawn = beside(stage="grpo", sequences=3, reference=True)
    pool = Pool(CONFIG, slots=3, kv_tokens=3 * 48, block_size=16, dtype=torch.float32, device=torch.device("cpu"))
    held = [tensor for part in ("conv", "ssm", "k", "v") for tensor in getattr(pool.state, part).values()]
    assert held and drawn.engine_bytes == sum(tensor.nbytes for tensor in held)
    assert drawn.reference_bytes == drawn.weights_bytes
    assert drawn.total_bytes == alone.total_bytes + drawn.engine_bytes + drawn.reference_bytes
    axes = Axes(fsdp=2)  # and then the engine's own whole weights
    cut = [beside(parallel=axes, accumulate=2), beside(stage="grpo", sequences=3, parallel=axes)]
    assert drawn.drawer_bytes == 0 and cut[1].drawer_bytes == alone.weights_bytes
    assert cut[1].total_bytes == cut[0].total_bytes + drawn.engine_bytes + alone.weights_bytes
    text = "\n".join([*drawn.lines(), *cut[1].lines(), *beside(stage="dpo").lines()])
    for words in (
        "(alone), grpo",
        "frozen weights",
        "answers that are drawn",
        "its log-probabilities alone",
        "own weights",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stage": "ppo"}, "stage is 'ppo'"),
        (
            {"stage": "grpo"},
            "sequences is 0 with stage grpo; set sequences to the answers drawn at once, for example 64",
        ),
        ({"sequences": 2}, "sequences is 2 with stage pretrain; set sequences to 0"),
        ({"stage": "dpo", "parallel": Axes(context=2)}, "parallel.context is not for dpo; set parallel.context to 1"),
        ({"tokens": -1.0}, "tokens is -1.0; set tokens to the length of the run"),
        ({"mfu": 35.0}, "mfu is 35.0; set mfu in"),
        ({"accumulate": 0}, "accumulate is 0; set accumulate to 1"),
        ({"accumulate": 3, "parallel": Axes(data=2)}, "set train.accumulate to 4"),
        ({"parallel": Axes(tensor=16)}, "tensor is 16, which does not divide n_groups 8; set it to 1 or 2 or 4 or 8"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        planned("nemotron-nano-9b-v2", **settings)


def test_a_vocabulary_that_cannot_be_cut_can_be_made_larger() -> None:
    with pytest.raises(UserError, match=r"does not divide vocab_size 31; set it to 1, or model.vocab_size to 32"):
        Axes(tensor=2).check_model(replace(CONFIG, num_key_value_heads=2))
