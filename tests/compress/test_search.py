"""Shapes under a bound, from configs alone; the order in which candidates are looked at."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from small_nets import HYBRID, LLAMA

from whimbrel.compress.search import Axes, Bound, Candidate, candidates, choose, estimated, largest, table
from whimbrel.engine.plan import plan
from whimbrel.errors import UserError
from whimbrel.model import count
from whimbrel.model.config import ModelConfig
from whimbrel.model.presets import preset

ALL = tuple(range(7))
NANO_12B, NANO_9B = preset("nemotron-nano-12b-v2"), preset("nemotron-nano-9b-v2")


def alignment(child: str, parent: str) -> tuple[int, ...]:
    """Places of the parent's pattern that spell the child's."""
    places, at = [], 0
    for letter in child:
        at = parent.index(letter, at)
        places.append(at)
        at += 1
    return tuple(places)


def test_the_9b_is_among_the_candidates_of_the_12b() -> None:
    """Nemotron Nano 2 (arXiv 2508.14444, section 4): 19.66 GiB, 131,072 tokens, bfloat16. Nothing is built."""
    stay = {62: tuple(range(62)), 56: alignment(NANO_9B.pattern, NANO_12B.pattern)}
    axes = Axes(layers=(62, 56), hidden_size=(5120, 4800, 4480), intermediate_size=tuple(range(13440, 20481, 320)))
    axes = replace(axes, mamba_num_heads=(128, 120, 112))
    bound = Bound(memory=int(19.66 * 2**30), context=131072)
    found = candidates(NANO_12B, stay, axes, bound)
    assert NANO_9B in [one.config for one in found]
    assert 50 < len(found) < 2 * 3 * 23 * 3
    for one in found:
        made = plan(one.config, memory=bound.memory, context=131072)
        assert (one.bytes, one.parameters) == (made.total_bytes, count.total(one.config))
        assert made.fits
    wide = [one for one in found if len(one.layers) == 56 and one.config.hidden_size == 5120]
    assert wide and max(one.config.intermediate_size for one in wide) < 20480  # full width does not fit
    coarse = replace(axes, intermediate_size=(13440, 15680, 17920, 20480))
    assert NANO_9B in [one.config for one in largest(candidates(NANO_12B, stay, coarse, bound))]


def test_the_largest_are_those_that_nothing_fitting_contains() -> None:
    found = candidates(HYBRID, {7: ALL, 6: (0, 1, 3, 4, 5, 6)}, Axes(layers=(7, 6)), Bound(parameters=6000))
    best = largest(found)
    assert 1 < len(best) < len(found)
    for one in found:
        above = [c for c in found if c is not one and all(a >= b for a, b in zip(c.shape, one.shape, strict=True))]
        assert (one in best) == (not above)


def test_grids_end_where_they_should() -> None:
    values = Axes().values(HYBRID)
    assert values["layers"] == (7, 6, 5)
    assert values["hidden_size"][0] == 24 and values["hidden_size"][-1] == 12
    assert values["mamba_num_heads"] == (6, 4, 2)  # whole heads for each of two groups
    assert [values[name] for name in ("mamba_head_dim", "num_key_value_heads")] == [(5,), (3,)]
    assert Axes().values(LLAMA)["layers"] == (6, 4)
    assert Axes().values(LLAMA)["mamba_num_heads"] == (6,)
    shallow = replace(HYBRID, pattern="M*-")
    assert Axes().values(shallow)["layers"] == (3,)


def test_query_heads_follow_their_keys() -> None:
    def heads(**axes: tuple[int, ...]) -> list[tuple[int, int]]:
        only = Axes(layers=(7,), hidden_size=(24,), intermediate_size=(20,), mamba_num_heads=(6,), **axes)
        found = candidates(HYBRID, {7: ALL}, only, Bound())
        return sorted((one.config.num_attention_heads, one.config.num_key_value_heads) for one in found)

    assert heads(num_key_value_heads=(3, 2)) == [(4, 2), (6, 3)]
    assert heads(num_key_value_heads=(3, 2), num_attention_heads=(6, 4, 3, 2)) == [(2, 2), (3, 3), (4, 2), (6, 3)]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (Axes(hidden_size=(25,)), "axes.hidden_size has 25; set it to multiples of 1 from 1 to the parent's 24"),
        (Axes(mamba_num_heads=(3,)), "axes.mamba_num_heads has 3; set it to multiples of 2 from 2"),
        (Axes(layers=(2,)), "axes.layers has 2; set it to multiples of 1 from 3"),
    ],
)
def test_values_no_cut_can_give(axes: Axes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        axes.values(HYBRID)
    with pytest.raises(UserError, match=r"axes\.layers has 3; set it to multiples of 2 from 2 to the parent's 6"):
        Axes(layers=(3,)).values(LLAMA)


def test_nothing_fits_names_a_memory_that_would() -> None:
    stay = {62: tuple(range(62))}
    axes = Axes(layers=(62,))
    with pytest.raises(UserError, match=r"nothing fits: .* set memory to \d+MiB, or give smaller values") as error:
        candidates(NANO_12B, stay, axes, Bound(memory=4 * 2**30, context=131072))
    works = int(str(error.value).partition("memory to ")[2].partition("MiB")[0]) * 2**20
    assert candidates(NANO_12B, stay, axes, Bound(memory=works, context=131072))
    with pytest.raises(UserError):
        candidates(NANO_12B, stay, axes, Bound(memory=works - 2**20, context=131072))
    with pytest.raises(UserError, match=r"share to 0\.\d+") as error:
        candidates(NANO_12B, stay, axes, Bound(parameters=count.total(NANO_12B) // 100))
    share = float(str(error.value).partition("share to ")[2].partition(",")[0])
    assert candidates(NANO_12B, stay, axes, Bound(parameters=int(share * count.total(NANO_12B))))


def test_an_estimate_adds_what_each_axis_alone_costs() -> None:
    """Every axis is looked at once a value; query heads go with their keys."""
    seen = []

    def loss(config: ModelConfig, layers: tuple[int, ...]) -> float:
        seen.append(config)
        assert "".join(HYBRID.pattern[i] for i in layers) == config.pattern
        assert not config.num_attention_heads % config.num_key_value_heads
        cuts = (7 - config.layers, 24 - config.hidden_size, 6 - config.num_attention_heads, 6 - config.mamba_num_heads)
        return 3.0 + sum(cut * weight for cut, weight in zip(cuts, (1000, 100, 10, 1), strict=True))

    axes = Axes(layers=(7, 6), hidden_size=(24, 20), intermediate_size=(20,), num_key_value_heads=(3, 1))
    found = candidates(HYBRID, {7: ALL, 6: (0, 1, 3, 4, 5, 6)}, axes, Bound())
    made = estimated(HYBRID, found, loss)
    assert len(made) == len(found) == 2 * 2 * 2 * 3
    assert len(seen) == len(set(seen)) == 1 + 1 + 1 + 1 + 2
    assert [one.estimate for one in made] == [loss(one.config, one.layers) for one in made]
    assert made[0].estimate == 3.0 < made[1].estimate < made[-1].estimate


def chosen(losses: dict[tuple[int, int], tuple[float, float]], scored: int, finalists: int) -> tuple[Candidate, list]:
    """Choose among candidates (layers, width) with these losses after the cut and after a trial."""
    calls = []
    some = []
    for layers, width in losses:
        config = ModelConfig(pattern="-" * layers, vocab_size=2, hidden_size=width, intermediate_size=1)
        some.append(Candidate(config, tuple(range(layers)), 0, 0, estimate=-width))

    def look(place: int):
        def loss(one: Candidate) -> float:
            calls.append(("cut", "trial")[place] + f" {len(one.layers)} {one.config.hidden_size}")
            return losses[len(one.layers), one.config.hidden_size][place]

        return loss

    return choose(some, scored, finalists, look(0), look(1)), calls


def test_depth_first_then_width() -> None:
    """The best of each depth are tried; then the next ones of the better depth alone, and none twice."""
    losses = {
        (4, 5): (1.0, 0.9),
        (4, 4): (1.1, 0.1),
        (3, 9): (2.0, 0.5),
        (3, 8): (1.5, 0.6),
        (3, 7): (1.6, 0.4),
        (3, 6): (9, 0),
    }
    order, calls = chosen(losses, 6, 2)
    assert calls[:5] == ["cut 3 9", "cut 3 8", "cut 3 7", "cut 4 5", "cut 4 4"]  # 6 / 2 depths, those of least estimate
    assert calls[5:] == ["trial 3 8", "trial 4 5", "trial 3 7"]
    assert (len(order[0].layers), order[0].config.hidden_size) == (3, 7)
    assert [math.isnan(one.trial_loss) for one in order] == [False] * 3 + [True] * 3
    assert [one.cut_loss for one in order[3:5]] == [1.1, 2.0] and math.isnan(order[5].cut_loss)
    assert len(table(order)) == 7


def test_a_single_finalist_is_not_tried() -> None:
    order, calls = chosen({(4, 5): (1.0, 0.9), (4, 4): (0.5, 9.0)}, 6, 1)
    assert (order[0].config.hidden_size, len(calls)) == (4, 2)
