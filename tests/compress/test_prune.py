"""Surgery: nothing cut is the same bits, moved units compute the same, cut units compute what silenced ones do."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_nets import HYBRID, NETS, everything, net, rows

from whimbrel.compress.importance import Importance, measure
from whimbrel.compress.prune import Units, cut, prove, select, top
from whimbrel.model import count
from whimbrel.model.config import ModelConfig
from whimbrel.model.language import LanguageModel
from whimbrel.model.layout import Layout

BY_NAME = pytest.mark.parametrize("name", NETS)


@torch.no_grad()
def logits(model: LanguageModel) -> torch.Tensor:
    """After three rows."""
    some = [model.head(model(torch.from_numpy(b.tokens_T), Layout.of(b.lengths))) for b in rows(model.config, 3, 5)]
    return torch.cat(some)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # float64; sums change their order


@BY_NAME
def test_the_cut_of_nothing_is_the_same_bits(name: str) -> None:
    model = net(NETS[name], dtype=torch.float32)
    found = measure(model, rows(model.config, 2))
    for units in (everything(model.config), select(found, model.config, model.config, range(model.config.layers))):
        child = cut(model, units, model.config)
        before, after = model.state_dict(), child.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert all(before[key].data_ptr() != after[key].data_ptr() for key in before)


@BY_NAME
def test_moved_units_compute_the_same(name: str) -> None:
    """Channels, neurons, query heads with their key/value head, Mamba heads inside their group, a head's channels."""
    model, config = net(NETS[name]), NETS[name]
    torch.manual_seed(1)
    inside = {}
    for layer, letter in enumerate(config.pattern):
        if letter == "M":
            each = config.mamba_num_heads // config.n_groups
            heads = torch.cat([torch.randperm(each) + group * each for group in range(config.n_groups)])
            inside[layer] = heads, torch.randperm(config.mamba_head_dim)
        elif letter == "*":
            each, keys = config.num_attention_heads // config.num_key_value_heads, torch.randperm(3)
            inside[layer] = keys, torch.cat([torch.randperm(each) + key * each for key in keys.tolist()])
        else:
            inside[layer] = (torch.randperm(config.intermediate_size),)
    moved = cut(model, Units(tuple(range(config.layers)), torch.randperm(config.hidden_size), inside), config)
    assert not torch.equal(moved.embeddings.weight, model.embeddings.weight)
    close(logits(moved), logits(model))


def test_heads_that_change_their_group_compute_something_else() -> None:
    model, units = net(HYBRID), everything(HYBRID)
    units.inside[0][0][[0, 3]] = torch.tensor([3, 0])
    assert (logits(cut(model, units, HYBRID)) - logits(model)).abs().max() > 1e-3


def silenced(model: LanguageModel, places: dict[str, torch.Tensor], dim: int) -> LanguageModel:
    """A copy in which these rows or columns are zero."""
    copy = cut(model, everything(model.config), model.config)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            for part, numbers in places.items():
                if part in name and (dim < parameter.dim()):
                    parameter.index_fill_(dim, numbers, 0.0)
    return copy


@BY_NAME
def test_cut_neurons_and_query_heads_are_silent_ones(name: str) -> None:
    model, config = net(NETS[name]), NETS[name]
    for axis, part, numbers in (
        ("intermediate_size", "down_proj.weight", [0, 7, 11]),
        ("", "o_proj.weight", [0, 3, 4]),
    ):
        units, gone = everything(config), torch.tensor(numbers)
        for layer, letter in enumerate(config.pattern):
            if letter == "-" and axis:
                units.inside[layer] = (torch.tensor([n for n in range(20) if n not in numbers]),)
            if letter == "*" and not axis:
                units.inside[layer] = torch.arange(3), torch.tensor([1, 2, 5])
        columns = gone if axis else (gone[:, None] * config.head_dim + torch.arange(config.head_dim)).flatten()
        shape = replace(config, intermediate_size=17) if axis else replace(config, num_attention_heads=3)
        close(logits(cut(model, units, shape)), logits(silenced(model, {part: columns}, 1)))


def test_cut_key_value_heads_are_silent_ones() -> None:
    model, units = net(HYBRID), everything(HYBRID)
    units.inside[3] = torch.tensor([0, 2]), torch.tensor([0, 1, 4, 5])
    child = cut(model, units, replace(HYBRID, num_attention_heads=4, num_key_value_heads=2))
    close(logits(child), logits(silenced(model, {"o_proj.weight": torch.arange(16, 32)}, 1)))


def test_cut_mamba_heads_and_channels_are_silent_ones() -> None:
    """Silent means z = 0. The norm of a group then takes its mean over fewer channels, which a factor makes good."""
    model, config = net(HYBRID), HYBRID
    units, heads, channels = everything(config), [0, 2, 3, 5], [0, 1, 4]
    for layer in config.indices("M"):
        units.inside[layer] = torch.tensor(heads), torch.tensor(channels)
    child = cut(model, units, replace(config, mamba_num_heads=4, mamba_head_dim=3))
    stay = {h * 5 + c for h in heads for c in channels}
    gone = torch.tensor([n for n in range(30) if n not in stay])
    parent = silenced(model, {"in_proj": gone}, 0)  # z comes first in in_proj, weight and bias
    with torch.no_grad():
        for layer in config.indices("M"):
            child.layers[layer].mixer.norm_weight.mul_(math.sqrt(15 / 6))  # channels of a group before and after
    close(logits(child), logits(parent))


def test_cut_channels_are_silent_ones() -> None:
    """Nothing writes to them; the norms take their mean over fewer channels."""
    model, config = net(HYBRID), HYBRID
    gone = torch.tensor([1, 5, 23])
    units = replace(everything(config), channels_D=torch.tensor([n for n in range(24) if n not in (1, 5, 23)]))
    child = cut(model, units, replace(config, hidden_size=21))
    parent = silenced(model, {"embeddings": gone}, 1)
    parent = silenced(parent, dict.fromkeys(("out_proj", "o_proj", "down_proj"), gone), 0)
    with torch.no_grad():
        for name, parameter in child.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight")):
                parameter.mul_(math.sqrt(24 / 21))
    close(logits(child), logits(parent))


def test_the_best_stay_and_every_group_keeps_as_many() -> None:
    found = Importance(
        torch.arange(24.0), {0: torch.zeros(6, 5), 1: torch.arange(20.0), 3: torch.tensor([9.0, 1, 3, 4, 8, 8])}
    )
    found.units[0][:3] = torch.tensor([[0.0, 5, 1, 1, 0], [0, 1, 1, 9, 0], [0, 3, 2, 2, 8]])
    found.units[0][3:] = 100 * torch.tensor([[0.0, 1, 1, 1, 0], [0, 3, 1, 2, 0], [0, 2, 1, 2, 0]])
    child = replace(HYBRID, pattern="M-*", hidden_size=22, intermediate_size=2, mamba_num_heads=4, mamba_head_dim=2)
    child = replace(child, num_attention_heads=2, num_key_value_heads=2)
    units = select(found, HYBRID, child, (0, 1, 3))
    heads, channels = units.inside[0]  # the third head is large in a channel that goes
    assert channels.tolist() == [1, 3]
    assert heads.tolist() == [0, 1, 4, 5]  # the second group has larger scores and keeps no more for it
    assert units.inside[1][0].tolist() == [18, 19]
    keys, queries = units.inside[3]
    assert (keys.tolist(), queries.tolist()) == ([0, 2], [0, 4])
    assert units.channels_D.tolist() == list(range(2, 24))
    assert top(torch.tensor([1.0, 1.0, 1.0, 2.0]), 3).tolist() == [0, 1, 3]  # the first wins a tie


def smaller(config: ModelConfig) -> tuple[ModelConfig, tuple[int, ...]]:
    """A child that is cut on every axis its parent has, and the layers it keeps."""
    layers = (0, 1, 3, 4, 6) if config.family == "nemotron_h" else (0, 1, 4, 5)
    shape = {"hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
    if "M" in config.pattern:
        shape |= {"mamba_num_heads": 4, "mamba_head_dim": 3}
    return replace(config, pattern="".join(config.pattern[i] for i in layers), **shape), layers


@BY_NAME
def test_planned_built_saved_loaded(name: str, tmp_path: Path) -> None:
    model, (planned, layers) = net(NETS[name], dtype=torch.float32), smaller(NETS[name])
    found = measure(model, rows(model.config, 2))
    child = cut(model, select(found, model.config, planned, layers), planned)
    assert child.config == planned
    assert {n: p.shape for n, p in child.named_parameters()} == {
        n: p.shape for n, p in LanguageModel(planned).named_parameters()
    }
    assert sum(p.numel() for p in child.parameters()) == count.total(planned) < count.total(model.config)
    child.save(tmp_path / "child")
    prove(child, tmp_path / "child")
    close(logits(LanguageModel.load(tmp_path / "child", dtype="float64")), logits(child.double()))
    with torch.no_grad():
        child.norm_f.weight[3] += 1
    with pytest.raises(AssertionError):
        prove(child, tmp_path / "child")


def test_a_plan_that_does_not_fit_the_units_is_not_built() -> None:
    model, (planned, layers) = net(HYBRID), smaller(HYBRID)
    units = select(measure(model, rows(HYBRID, 1)), HYBRID, planned, layers)
    with pytest.raises(RuntimeError, match="size mismatch"):
        cut(model, units, replace(planned, intermediate_size=13))
