"""Scores by hand: literal numbers on a net of one layer, the definition written out on one of every letter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_nets import HYBRID, LLAMA, NETS, net, rows
from torch import Tensor

from whimbrel import ops
from whimbrel.compress.importance import blocks, depths, measure
from whimbrel.compress.prune import cut
from whimbrel.data.pack import Batch
from whimbrel.model.config import ModelConfig
from whimbrel.model.layout import Layout


def test_by_hand() -> None:
    """(3, 4) and (0, 2), normed, squared by the activation: 0.72, 1.28 and 0, 2. A row of both, a row of the first."""
    config = ModelConfig(pattern="-", vocab_size=2, hidden_size=2, intermediate_size=2, norm_eps=1e-20)
    model = net(config)
    with torch.no_grad():
        model.embeddings.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        model.layers[0].mixer.up_proj.weight.copy_(torch.eye(2))
        model.layers[0].mixer.down_proj.weight.zero_()
        for norm in (model.layers[0].norm, model.norm_f):
            norm.weight.copy_(torch.tensor([1.0, -1.0]))
        model.layers[0].mixer.up_proj.weight[1, 1] = -1.0
    both, first = (Batch(np.array(ids), np.full(len(ids), -100), (1,) * len(ids), 0) for ids in ([0, 1], [0]))
    found = measure(model, [both, first])
    channels_D, units = found.channels_D, found.units
    assert units[0].tolist() == pytest.approx([(0.36**2 + 0.72**2) ** 0.5, (1.64**2 + 1.28**2) ** 0.5])
    low, high = 0.72**0.5, 1.28**0.5
    one = [(low / 2) ** 2 + low**2, ((high + 2**0.5) / 2) ** 2 + high**2]
    assert channels_D.tolist() == pytest.approx([2 * one[0] ** 0.5, 2 * one[1] ** 0.5])  # two norms, the same stream


def written_out(model, batches) -> tuple[Tensor, dict[int, Tensor]]:
    """The definition, without a hook."""
    config = model.config
    squares: dict[str | int, Tensor] = {}
    for batch in batches:
        layout = Layout.of(batch.lengths)
        x_TD = model.embeddings(torch.from_numpy(batch.tokens_T))
        seen: dict[str | int, Tensor] = {}
        for place, letter in enumerate(config.pattern):
            layer, mixer = model.layers[place], model.layers[place].mixer
            n_TD = seen[f"norm{place}"] = layer.norm(x_TD)
            if letter == "M":
                seen[place] = mixer.in_proj(n_TD)[:, config.mamba_inner : 2 * config.mamba_inner]
            elif letter == "*":
                q, k, v = mixer._project(n_TD, layout)
                seen[place] = ops.attention(q, k, v, layout.segments, layout.segments).square().sum(-1).sqrt()
            else:
                up = mixer.up_proj(n_TD)
                seen[place] = ops.swiglu(mixer.gate_proj(n_TD), up) if mixer.gated else torch.relu(up) ** 2
            x_TD = layer(x_TD, layout, None)
        seen["norm_f"] = model.norm_f(x_TD)
        for key, value in seen.items():
            squares[key] = squares.get(key, 0) + value.abs().mean(0) ** 2
    channels_D = sum(value.sqrt() for key, value in squares.items() if isinstance(key, str))
    units = {key: value.sqrt() for key, value in squares.items() if isinstance(key, int)}
    return channels_D, units


@pytest.mark.parametrize("name", NETS)
def test_the_definition(name: str) -> None:
    model, batches = net(NETS[name]), rows(NETS[name], 3)
    with torch.no_grad():
        channels_D, units = written_out(model, batches)
    found = measure(model, batches)
    torch.testing.assert_close(found.channels_D, channels_D, rtol=1e-10, atol=0)
    assert found.units.keys() == units.keys()
    for layer, scores in units.items():
        torch.testing.assert_close(found.units[layer].flatten(), scores, rtol=1e-10, atol=0)
    if "M" in NETS[name].pattern:
        assert found.units[0].shape == (6, 5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("config", [HYBRID, replace(LLAMA, tie_embeddings=False)], ids=["hybrid", "llama"])
def test_layers_go_by_the_error_of_the_logits(config: ModelConfig) -> None:
    """Every removal is the best of all that were possible, found by cutting each and looking at all logits."""
    from small_nets import everything

    model, batches = net(config), rows(config, 3)
    step = 1 if config.family == "nemotron_h" else 2
    with torch.no_grad():
        whole = [model.head(model(torch.from_numpy(b.tokens_T), Layout.of(b.lengths))) for b in batches]

        def error(layers: list[int]) -> float:
            units = replace(everything(config), layers=tuple(layers))
            shape = replace(config, pattern="".join(config.pattern[i] for i in layers))
            child, total = cut(model, units, shape), 0.0
            for batch, logits_TV in zip(batches, whole, strict=True):
                got = child.head(child(torch.from_numpy(batch.tokens_T), Layout.of(batch.lengths)))
                total += float((got - logits_TV).square().sum())
            return total

        left, told = list(range(config.layers)), []
        stay = depths(model, batches, config.layers - 2 * step, report=told.append)
        assert list(stay) == [config.layers, config.layers - step, config.layers - 2 * step]
        power = sum(float(logits.square().sum()) for logits in whole)
        for line in told:
            options = {}
            for block in (tuple(left[i : i + step]) for i in range(0, len(left), step)):
                rest = [layer for layer in left if layer not in block]
                if {config.pattern[i] for i in rest} == set(config.pattern):
                    options[block] = error(rest)
            gone = min(options, key=options.__getitem__)
            left = [layer for layer in left if layer not in gone]
            assert stay[len(left)] == tuple(left)
            assert line["text"].endswith(f"matters least: {options[gone] / power:.2%}")


def test_one_look_takes_those_that_turn_the_stream_least() -> None:
    model, batches = net(HYBRID), rows(HYBRID, 3)
    turns = [0.0] * HYBRID.layers
    with torch.no_grad():
        for batch in batches:
            x_TD = model.embeddings(torch.from_numpy(batch.tokens_T))
            for place, layer in enumerate(model.layers):
                y_TD = layer(x_TD, Layout.of(batch.lengths), None)
                cosine_T = (x_TD * y_TD).sum(-1) / (x_TD.norm(dim=-1) * y_TD.norm(dim=-1))
                turns[place] += float((1 - cosine_T).sum())
                x_TD = y_TD
    free = sorted((place for place in range(HYBRID.layers) if HYBRID.pattern[place] != "*"), key=turns.__getitem__)
    stay = depths(model, batches, HYBRID.layers - 2, "cosine")
    assert stay[6] == tuple(i for i in range(7) if i != free[0])
    assert stay[5] == tuple(i for i in range(7) if i not in free[:2])


def test_one_layer_of_each_letter_stays() -> None:
    stay = depths(net(HYBRID), rows(HYBRID, 1), 3)
    assert sorted(HYBRID.pattern[i] for i in stay[3]) == ["*", "-", "M"]
    assert blocks(LLAMA) == [(0, 1), (2, 3), (4, 5)]
    assert depths(net(LLAMA), rows(LLAMA, 1), 6) == {6: (0, 1, 2, 3, 4, 5)}
