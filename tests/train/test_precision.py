"""FP8 linear layers: signal to noise of the thresholds in use (torchao's), layouts as CUDA wants them, and training."""

import numpy as np
import pytest
import torch
from torch import nn

from whimbrel import ops
from whimbrel.errors import UserError
from whimbrel.model import LanguageModel, ModelConfig
from whimbrel.ops.fp8 import E4M3, E5M2, Scaled, check_layout, product, quantise
from whimbrel.train import precision
from whimbrel.train.loop import TrainSettings
from whimbrel.train.precision import Fp8, converted

RECIPES = ("tensorwise", "rowwise", "blockwise")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decibels(got, true):
    return 20 * torch.log10(true.norm() / (got - true).norm()).item()


@pytest.mark.parametrize("kind", ["tensor", "row", "block", "square"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_cast_keeps_its_bits_and_never_overflows(kind, dtype):
    x = normal(70, 200) * torch.logspace(-3, 3, 70)[:, None]
    wide = quantise(x, kind, dtype).wide()
    assert torch.isfinite(wide).all()
    if kind in ("row", "block"):
        assert decibels(wide, x) > (25 if dtype == E4M3 else 20)
    assert quantise(torch.zeros(16, 128), kind, dtype).wide().abs().max() == 0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tokens", [1, 50, 256])
@pytest.mark.parametrize("into, out", [(256, 384), (15680 // 16, 144)])
def test_signal_to_noise_of_a_layer(recipe, tokens, into, out):
    """18 dB forward and 17 dB for gradients; blockwise 25 dB forward."""
    if into % 16:
        into += 16 - into % 16
    x, weight, up = normal(tokens, into), normal(out, into, seed=1) / 16, normal(tokens, out, seed=2)
    results = []
    for form in (lambda a, b: a @ b.t(), lambda a, b: precision.linear(a, b, None, recipe)):
        leaves = [v.clone().requires_grad_() for v in (x, weight)]
        y = form(*leaves)
        results.append((y, *torch.autograd.grad((y * up).sum(), leaves)))
    gains = [decibels(got, true) for true, got in zip(*results, strict=True)]
    assert gains[0] > (25 if recipe == "blockwise" else 18)
    assert min(gains[1:]) > 17


def test_the_native_product_is_that_of_the_widened_operands():
    for kind, second in (("tensor", E4M3), ("tensor", E5M2), ("row", E4M3), ("block", E4M3)):
        a, b = (
            quantise(normal(33, 256), kind, second),
            quantise(normal(48, 256, seed=1), "square" if kind == "block" else kind),
        )
        torch.testing.assert_close(product(a, b).float(), a.wide() @ b.wide().t(), rtol=7e-2, atol=7e-2)


def recoded(v, dtype):
    return Scaled(v.codes.float().to(dtype), v.scale, v.kind)


def across(v):
    return Scaled(v.codes.view(torch.uint8).t().contiguous().t().view(E4M3), v.scale, v.kind)


def rows(count, width=64, kind="tensor"):
    return quantise(normal(count, width), kind)


def spread(v):
    return Scaled(v.codes, v.scale.repeat(1, 2)[:, :2], v.kind)


@pytest.mark.parametrize("change, words", [
    (lambda a, b: (a, rows(40)), "40 columns"),
    (lambda a, b: (rows(4, 72), rows(48, 72)), "72 summed"),
    (lambda a, b: (across(a), b), "row by row"),
    (lambda a, b: (recoded(a, E5M2), recoded(b, E5M2)), "E4M3"),
    (lambda a, b: (a, rows(48, kind="row")), "no mode"),
    (lambda a, b: (a, Scaled(b.codes, b.scale.double(), b.kind)), "float32"),
    (lambda a, b: (rows(32, kind="block"), spread(rows(48, kind="block"))), "scales are"),
])  # fmt: skip
def test_what_cuda_refuses_is_refused_everywhere(change, words):
    a, b = rows(32), rows(48)
    check_layout(a, b)
    with pytest.raises(AssertionError, match=words):
        check_layout(*change(a, b))


def small(**fields):
    config = ModelConfig(pattern="M-*-M-", vocab_size=64, hidden_size=128, intermediate_size=256, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=32, mamba_num_heads=16, mamba_head_dim=16, ssm_state_size=16,
                         n_groups=2, **fields)  # fmt: skip
    return LanguageModel(config).initialise(0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_hybrid_learns_in_fp8_as_without(recipe):
    """The same batch 25 times: the loss falls as far, the names stay, and evaluation is exact."""
    from whimbrel.train.objective import CrossEntropy
    from whimbrel.train.step import train_step

    class Row:
        tokens_T = np.random.default_rng(0).integers(0, 64, 96)
        targets_T = np.roll(tokens_T, -1)
        lengths = (50, 46)

    losses = {}
    for name in ("none", recipe):
        model = small()
        names = list(model.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        with converted(model, Fp8(name, ends=1)) as layers:
            losses[name] = [train_step(model, CrossEntropy(), [Row], optimizer, clip=1.0).loss for _ in range(25)]
            with torch.no_grad():
                inside = model(torch.arange(20)[None])
        assert bool(layers) == (name != "none") and list(model.state_dict()) == names
        assert not any(layer.startswith(("layers.0.", "layers.5.")) for layer in layers)
        torch.testing.assert_close(inside, model(torch.arange(20)[None]), rtol=0, atol=0)
    start, end = losses["none"][0], losses["none"][-1]
    assert end < 0.5 * start
    assert abs(losses[recipe][-1] - end) < 0.1 * (start - end)
    assert losses[recipe] != losses["none"], "nothing ran in FP8"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_square_that_is_rounded_as_it_is_computed_is_that_square(recipe):
    """Values and gradients of down_proj(relu(x)^2), and nothing but x and the weight is kept for them."""
    x, weight, up = normal(50, 256), normal(144, 256, seed=1), normal(50, 144, seed=2)
    kept, found = [], []
    for squared in (True, False):
        leaves = [v.clone().requires_grad_() for v in (x, weight)]
        with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.shape) or v, lambda v: v):
            y = precision.linear(leaves[0] if squared else ops.relu2(leaves[0]), leaves[1], None, recipe, squared)
        if squared:
            assert kept == [x.shape, weight.shape]
        y.backward(up)
        found.append([y, *(v.grad for v in leaves)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_squares_of_an_mlp_are_rounded_as_they_are_computed_and_given_back(monkeypatch):
    model, seen = small(), []
    linear = precision.linear
    monkeypatch.setattr(precision, "linear", lambda *row: seen.append(row[-1]) or linear(*row))
    with converted(model, Fp8("blockwise", ends=1)) as layers:
        model(torch.arange(20)[None])
    squares = [name for name in layers if name.endswith("down_proj")]
    assert seen.count(True) == len(squares) > 0 and seen.count(False) == len(layers) - len(squares)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_lay_around_a_layer_before_the_block_or_came_in_it_stays():
    """As tensor parallelism does, which wraps what it finds; behind the block nothing multiplies in FP8."""
    model, tokens = small(), torch.arange(20)[None]
    expected, seen = model(tokens), []

    def wrap(module, say):
        module.forward = lambda *args, inner=module.forward: seen.append(say) or inner(*args)

    wrap(model.layers[3].mixer.down_proj, "before")
    with converted(model, Fp8("rowwise", ends=1)):
        wrap(model.layers[3].mixer.down_proj, "last")
        wrap(model.layers[3].mixer, "mixer")
        assert not torch.equal(model(tokens), expected) and seen == ["mixer", "last"]
    assert torch.equal(model(tokens), expected) and seen[2:] == ["mixer", "last", "before"]
    with converted(model, Fp8("rowwise", ends=1)):
        assert not torch.equal(model(tokens), expected)
    assert torch.equal(model(tokens), expected) and seen[-3:] == ["mixer", "last", "before"]


def test_layers_of_odd_sides_and_packed_ones_stay_as_they_are():
    assert precision.suitable(nn.Linear(128, 144)) and not precision.suitable(nn.Linear(120, 256))
    assert not precision.suitable(nn.Linear(128, 136)) and not precision.suitable(nn.ReLU())


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UserError, match=r"train\.fp8\.recipe is 'tensor'.*tensorwise"):
        Fp8("tensor")
    with pytest.raises(UserError, match=r"train\.fp8\.ends is -1"):
        TrainSettings(fp8=Fp8("rowwise", ends=-1))
    with pytest.raises(UserError, match="no layer between"), converted(small(), Fp8("rowwise", ends=3)):
        pass
