"""The mathematics of GRPO against cases computed by hand, and its gradient against the one it stands for."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
import torch
from small_world import network
from torch import Tensor

from whimbrel.align.policy import FAR, PolicyBatch, PolicyGradient, advantages, divergence, log_probs, surrogate
from whimbrel.align.rollout import Sample, pack
from whimbrel.engine.answer import Answer
from whimbrel.train.step import accumulate


@pytest.mark.parametrize(
    ("leave_one_out", "normalise", "wanted"),
    [
        (True, False, [1, -1 / 3, -1 / 3, -1 / 3]),  # 1 - 0; 0 - 1/3
        (False, False, [0.75, -0.25, -0.25, -0.25]),
        (True, True, [2, -2 / 3, -2 / 3, -2 / 3]),  # over the sample's deviation, 1/2
        (False, True, [1.5, -0.5, -0.5, -0.5]),
    ],
)
def test_advantages_by_hand(leave_one_out: bool, normalise: bool, wanted: list[float]) -> None:
    assert advantages([1, 0, 0, 0], leave_one_out, normalise) == pytest.approx(wanted)
    assert advantages([1, 1, 1, 1], leave_one_out, normalise) is None


def test_divergences_by_hand() -> None:
    log_p, log_ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])  # d = -0.5 and 1
    assert divergence("k1", log_p, log_ref).tolist() == [0.5, -1.0]
    assert divergence("k2", log_p, log_ref).tolist() == [0.125, 0.5]
    assert divergence("k3", log_p, log_ref).tolist() == pytest.approx([exp(-0.5) - 1 + 0.5, exp(1) - 1 - 1])
    far = divergence("k3", torch.tensor([-1000.0]), torch.tensor([0.0]))
    assert far.item() == pytest.approx(exp(FAR), rel=1e-6)


def test_divergences_on_average() -> None:
    """Over all tokens: the values of k1 and k3 are KL(p || ref), k2's gradient is its gradient, k3's that of
    KL(ref || p), k1's nothing."""
    logits = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64, requires_grad=True)
    log_ref = torch.tensor([-0.5, 0.1, 0.4], dtype=torch.float64).log_softmax(0)
    log_p = logits.log_softmax(0)
    p, ref = log_p.detach().exp(), log_ref.exp()
    kl = (log_p.exp() * (log_p - log_ref)).sum()
    other = (ref * (log_ref - log_p)).sum()

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    means = {kind: (p * divergence(kind, log_p, log_ref)).sum() for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(means["k1"], kl)
    torch.testing.assert_close(means["k3"], kl)
    torch.testing.assert_close(gradient(means["k2"]), gradient(kl))
    torch.testing.assert_close(gradient(means["k3"]), gradient(other))
    assert gradient(means["k1"]).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("ratio", "advantage", "wanted", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.5, 1.0, 1.28, 0.0),  # likely enough already
        (1.5, -1.0, -1.5, -1.5),  # a mistake that grew: pulled back in full
        (0.5, 1.0, 0.5, 0.5),
        (0.5, -1.0, -0.8, 0.0),
    ],
)
def test_the_surrogate_by_hand(ratio: float, advantage: float, wanted: float, slope: float) -> None:
    log_p = torch.tensor(log(ratio) - 3, dtype=torch.float64, requires_grad=True)
    old = torch.tensor(-3.0, dtype=torch.float64)
    gain = surrogate(log_p, old, torch.tensor(advantage, dtype=torch.float64), 0.2, 0.28)
    gain.backward()
    assert gain.item() == pytest.approx(wanted) and log_p.grad is not None
    assert log_p.grad.item() == pytest.approx(slope)


def answer(ids: list[int], forced: tuple[int, ...] = ()) -> Answer:
    """An answer of these ids, whose place says its log-probability."""
    drawn = tuple(-0.01 * place for place in range(len(ids)))
    return Answer(0, 0, "", "", tuple(ids), forced, "stop", None, "off", 3, 0, 0, drawn, None, 0.0, 0.0, 0.0)


SAMPLES = [
    Sample((5, 6, 7), answer([8, 9, 10, 11], forced=(1, 2)), 1.0),
    Sample((5, 6, 7), answer([20, 12]), -0.5),
    Sample((30, 31), answer([32, 33, 34, 35, 36]), 0.25),
]


def known(batch: PolicyBatch, model: torch.nn.Module, shift: float = 0.0) -> PolicyBatch:
    """The batch as the trainer scores it; `shift` moves what the policy was at drawing."""
    with torch.no_grad():
        scored = log_probs(model, batch, 4).numpy()  # type: ignore[arg-type]
    return replace(batch, old_R=scored + np.float32(shift), reference_R=scored - np.float32(0.1))


def test_rows_targets_and_what_was_known_lie_together() -> None:
    """What the engine wrote itself is not among them; a row is the token before its target."""
    (batch,) = pack(SAMPLES[:2], 100)
    assert batch.lengths == (7, 5)
    assert batch.targets_R.tolist() == [8, 11, 20, 12]
    assert batch.tokens_T[batch.rows_R].tolist() == [7, 10, 7, 20]
    assert batch.sampler_R.tolist() == pytest.approx([0, -0.03, 0, -0.01])
    assert batch.advantage_R.tolist() == [1, 1, -0.5, -0.5]
    assert [len(one.lengths) for one in pack(SAMPLES, 12)] == [2, 1]


def test_log_probs_are_those_of_each_text_alone() -> None:
    """Packed = separate, and of the token that follows, not of the one that stands there."""
    model = network()
    (batch,) = pack(SAMPLES, 100)
    found = log_probs(model, batch, 4)
    wanted = []
    for sample in SAMPLES:
        ids = [*sample.prompt, *sample.answer.ids]
        logp_LV = model(torch.tensor([ids]))[0].log_softmax(-1)
        places = [len(sample.prompt) + place for place in sample.learned()]
        wanted += [logp_LV[place - 1, ids[place]].item() for place in places]
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)


def test_the_gradient_on_policy_is_that_of_reinforce() -> None:
    """-1/N sum A grad log p over all tokens; what is clipped elsewhere is nowhere clipped here."""
    model = network()
    batch = known(pack(SAMPLES, 100)[0], model)
    loss, terms = accumulate(model, PolicyGradient(0.2, 0.28), [batch], learn=True)
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    gain = (torch.from_numpy(batch.advantage_R) * log_probs(model, batch, 4)).sum()
    (-gain / len(batch.targets_R)).backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert loss == pytest.approx(-float(batch.advantage_R.mean()), abs=1e-6)
    assert terms["clipped"] == 0


def test_tokens_count_alike_however_they_are_cut_into_micro_batches() -> None:
    """One mean over the tokens of all micro-batches, not a mean of their means."""
    model = network()
    objective = PolicyGradient(0.2, 0.28, "k3", 0.5)
    whole = accumulate(model, objective, [known(b, model, 0.1) for b in pack(SAMPLES, 100)], learn=True)
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    parts = [known(b, model, 0.1) for b in pack(SAMPLES, 1)]
    assert [len(part.targets_R) for part in parts] == [2, 2, 5]
    found = accumulate(model, objective, parts, learn=True)
    assert found[0] == pytest.approx(whole[0], rel=1e-5) and found[1] == pytest.approx(whole[1], rel=1e-5)
    for parameter, theirs in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, theirs, atol=1e-6, rtol=1e-4)


def test_the_loss_adds_the_divergence_and_counts_what_is_clipped() -> None:
    model = network()
    batch = known(pack(SAMPLES, 100)[0], model, shift=-log(1.5))  # every ratio is 1.5
    loss, terms = accumulate(model, PolicyGradient(0.2, 0.28, "k1", 0.5), [batch], learn=False)
    gains = np.where(batch.advantage_R > 0, 1.28, 1.5) * batch.advantage_R
    assert terms["policy"] == pytest.approx(-gains.mean(), rel=1e-5)
    assert terms["kl"] == pytest.approx(0.1, rel=1e-4)  # log p - log ref
    assert loss == pytest.approx(terms["policy"] + 0.5 * 0.1, rel=1e-5)
    assert terms["clipped"] == pytest.approx((batch.advantage_R > 0).mean())
