"""The sampler against a plain float64 definition, and its randomness row by row."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from whimbrel.engine.sampler import Draw, Kinds, draw, kinds, numbers, sample, top_log_probs, uniform, uniforms
from whimbrel.engine.sampling import Sampling


def expected(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution a row is drawn from, by the definitions and one token at a time."""
    probs = (logits.double() / sampling.temperature).softmax(-1)
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    order = order[: sampling.top_k or len(order)]
    total = sum(float(probs[token]) for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass < sampling.top_p * total and probs[token] >= sampling.min_p * probs[order[0]]:
            kept.append(token)
        mass += float(probs[token])
    out = torch.zeros_like(probs)
    out[kept] = probs[kept] / probs[kept].sum()
    return out


SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5, top_k=3),
    Sampling(temperature=1.3, top_p=0.7),
    Sampling(temperature=1.0, top_k=5, top_p=0.8),
    Sampling(temperature=1.0, min_p=0.3),
    Sampling(temperature=1.0, top_p=0.95, min_p=0.1),
]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_frequencies_follow_the_definition(sampling):
    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(1))
    rows = 4000
    drawn = sample(logits.expand(rows, -1), [Draw(sampling, 7, 0, position) for position in range(rows)])
    share = torch.bincount(torch.tensor(drawn), minlength=12) / rows
    wanted = expected(logits, sampling)
    assert set(drawn) <= set(wanted.nonzero().flatten().tolist())
    assert (share - wanted).abs().max() < 0.03


def test_a_flat_row_over_many_tokens_is_truncated_exactly():
    """More tokens than the likeliest 1024 carry top_p: the whole row has to be ordered."""
    logits = torch.linspace(0, 0.1, 3000)
    sampling = Sampling(temperature=1.0, top_p=0.9)
    allowed = set(expected(logits, sampling).nonzero().flatten().tolist())
    drawn = sample(logits.expand(3000, -1), [Draw(sampling, 0, 0, position) for position in range(3000)])
    assert set(drawn) <= allowed
    assert min(drawn) < min(allowed) + 30, "the unlikely end of what is kept is drawn too"


@pytest.mark.parametrize("top_k", [1023, 1024, 1025, 2000, 2999, 3000, 5000])
def test_top_p_is_a_share_of_what_top_k_keeps_however_many_that_are(top_k):
    """Around the short list of 1024 likeliest and the vocabulary of 3000, on the host and on the device."""
    logits = torch.linspace(0, 0.1, 3000)
    sampling = Sampling(temperature=1.0, top_k=top_k, top_p=0.5)
    allowed = set(expected(logits, sampling).nonzero().flatten().tolist())
    draws = [Draw(sampling, 0, 0, position) for position in range(3000)]
    drawn = sample(logits.expand(3000, -1), draws)
    assert set(drawn) <= allowed
    assert min(drawn) < min(allowed) + 30, "the unlikely end of what is kept is drawn too"
    ids = draw(logits.expand(3000, -1), numbers(draws), Kinds(False, True)).tolist()
    assert ids == (drawn if top_k <= 1024 else [-1] * 3000)
    ids = draw(logits.expand(3000, -1), numbers(draws), Kinds(False, True, ordered=700)).tolist()
    assert ids == (drawn if top_k <= 1024 else drawn[:700] + [-1] * 2300)


def test_a_peaked_row_needs_no_order_of_the_whole_unless_top_k_is_between():
    """Where 1024 tokens carry top_p: with a top_k beyond them, what top_p is a share of is not known from them."""
    logits = torch.linspace(0, 60, 3000)
    for top_k, known in ((0, True), (10, True), (2000, False), (3000, True)):
        draws = [Draw(Sampling(temperature=1.0, top_k=top_k, top_p=0.5), 0, 0, position) for position in range(50)]
        ids = draw(logits.expand(50, -1), numbers(draws), Kinds(False, True)).tolist()
        assert ids == (sample(logits.expand(50, -1), draws) if known else [-1] * 50)


def test_draws_on_the_device_are_those_of_the_host():
    """Every setting in one batch, greedy and penalised rows too; only where all V must be sorted and the row is not
    among the first is the host asked (-1).
    """
    mixed = [
        Sampling(),
        *SETTINGS,
        Sampling(temperature=2.0, top_k=1500),
        Sampling(temperature=0.4, top_p=0.99, seed=1),
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.7),
        Sampling(temperature=1.1, repetition_penalty=0.6),
    ]
    logits = 3 * torch.randn(900, 3000, generator=torch.Generator().manual_seed(4))
    seen = torch.rand(900, 3000, generator=torch.Generator().manual_seed(5)) < 0.4
    settings = [mixed[row % len(mixed)] for row in range(900)]
    draws = [Draw(s, row, 0, row, seen[row] if s.repetition_penalty != 1 else None) for row, s in enumerate(settings)]
    assert kinds(draws) == (True, True, True, True, True, 0)
    assert kinds([draws[8]._replace(wide=True)]) == (False, True, False, False, False, 1)
    mine, true = draw(logits, numbers(draws), kinds(draws), seen).tolist(), sample(logits, draws)
    before = sample(logits, [d._replace(sampling=replace(d.sampling, repetition_penalty=1.0)) for d in draws])
    assert sum(a != b for a, b in zip(before, true, strict=True)) > 100, "a penalty changes what is drawn"
    assert true == [sample(logits[row : row + 1], [one])[0] for row, one in enumerate(draws)]
    assert sample(logits, [one._replace(wide=row % 5 == 0) for row, one in enumerate(draws)]) == true
    some = draw(logits, numbers(draws), kinds(draws)._replace(ordered=450), seen).tolist()
    assert some[:450] == true[:450] and some[450:] == mine[450:]
    asked = [row for row, token in enumerate(mine) if token < 0]
    assert [t for row, t in enumerate(mine) if row not in asked] == [
        t for row, t in enumerate(true) if row not in asked
    ]
    assert asked and {mixed[row % len(mixed)].top_k for row in asked if row % len(mixed) == 7} == {1500}
    assert not any(row % len(mixed) in (0, 1, 2, 4, 5) for row in asked), "whole rows and short lists never need it"
    assert draw(logits, numbers(draws), Kinds(False, False)).equal(logits.argmax(-1)), (
        "greedy is the likeliest, bit for bit"
    )


@pytest.mark.parametrize("sampling", SETTINGS)
def test_frequencies_on_the_device_follow_the_definition(sampling):
    """Chi-square against the definition: its 0.9999 quantile for 11 degrees of freedom is 37.4."""
    logits, rows = 2 * torch.randn(12, generator=torch.Generator().manual_seed(1)), 4000
    draws = [Draw(sampling, 11, 0, position) for position in range(rows)]
    ids = draw(logits.expand(rows, -1), numbers(draws), kinds(draws))
    counts, wanted = torch.bincount(ids, minlength=12).double(), rows * expected(logits, sampling)
    assert not counts[wanted == 0].any()
    inside = wanted > 0
    assert ((counts - wanted)[inside] ** 2 / wanted[inside]).sum() < 37.4


def test_a_row_does_not_depend_on_its_mates():
    logits = torch.randn(6, 2000, generator=torch.Generator().manual_seed(2)) * 3
    draws = [Draw(sampling, row + 3, row, 5) for row, sampling in enumerate([*SETTINGS[:5], Sampling()])]
    together = sample(logits, draws)
    assert together == [sample(logits[row : row + 1], [draw])[0] for row, draw in enumerate(draws)]
    assert together[::-1] == sample(logits.flip(0), draws[::-1])


def test_penalty_pushes_used_tokens_down_whatever_their_sign():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.4]])
    before = logits.clone()
    used = torch.tensor([True, False, True, False])
    draw = Draw(Sampling(repetition_penalty=1.5), 0, 0, 0, used)
    assert sample(logits, [draw]) == [1]  # 2.0 / 1.5 falls below 1.5
    low = torch.full((1, 4), -9.0)
    low[0, 2:] = torch.tensor([-1.0, -1.4])
    assert sample(low, [draw]) == [3]  # -1.0 * 1.5 falls below -1.4
    assert torch.equal(logits, before), "the caller's logits stay as they are"


def test_uniform_numbers_differ_by_every_argument_and_fill_the_interval():
    values = [uniform(seed, number, position) for seed in range(10) for number in range(10) for position in range(10)]
    assert len(set(values)) == 1000 and all(0 <= value < 1 for value in values)
    tenths = Counter(int(value * 10) for value in values)
    assert min(tenths.values()) > 65 and max(tenths.values()) < 140


def test_numbers_of_a_batch_are_those_of_each_draw():
    draws = [Draw(Sampling(), seed, k, p) for seed in (0, 7, 2**63, 2**127 + 5) for k in (0, 3) for p in (0, 1, 4095)]
    assert uniforms(draws) == [uniform(d.seed, d.sample, d.position) for d in draws]


def test_log_probabilities_of_the_chosen_and_the_likeliest():
    logits = torch.tensor([1.0, 3.0, 2.0])
    ((chosen, top),) = top_log_probs(logits[None], [0], [2])
    reference = logits.double().log_softmax(-1)
    assert chosen == pytest.approx(float(reference[0]), abs=1e-6)
    assert [token for token, _ in top] == [1, 2]
    assert [value for _, value in top] == pytest.approx(reference[[1, 2]].tolist(), abs=1e-6)
    assert top_log_probs(logits[None], [1], [0])[0][1] == ()
