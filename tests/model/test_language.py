"""The network in float64: packed = separate, chunked with a state = one pass, recurrent = chunked, wrapper = flat."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel import ops
from whimbrel.errors import UserError
from whimbrel.model import LanguageModel, Layout, ModelConfig, State
from whimbrel.ops import cpu
from whimbrel.ops.cpu import matmul

HYBRID = ModelConfig(
    pattern="M-MM*--M*",
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=6,
    mamba_head_dim=8,
    ssm_state_size=10,
    n_groups=2,
)
DENSE = ModelConfig(
    pattern="*-*-",
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    mlp="swiglu",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    qk_norm=True,
    rope_theta=1e4,
    rope_fraction=0.6,
    norm="layernorm1p",
    mlp_bias=True,
    attention_bias=True,
    tie_embeddings=True,
    family="nemotron",
)


def random_model(config, seed=0, dtype=torch.float64):
    """A model in which no parameter is trivial: norms are not 1, biases are not 0, projections are not small."""
    model = LanguageModel(config, dtype=dtype).initialise(seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "A_log" not in name and "dt_bias" not in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
            elif "conv" not in name and parameter.dim() == 2:
                parameter.mul_(8)
    return model


@pytest.mark.parametrize("config", [HYBRID, DENSE], ids=["hybrid", "dense"])
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7), seed=st.integers(0, 9))
def test_packed_equals_separate(config, lengths, seed):
    model = random_model(config)
    tokens = torch.randint(0, 50, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    packed = model(tokens, Layout.of(lengths))
    alone = torch.cat([model(part, Layout.of([len(part)])) for part in tokens.split(lengths)])
    torch.testing.assert_close(packed, alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("slots", "laid"), [(4, True), (200, False)])
def test_many_sequences_begin_in_small_pages(monkeypatch, slots, laid):
    """A huge page of every tensor for the first token of each of 200 sequences would be gigabytes."""
    seen = []
    monkeypatch.setattr("whimbrel.model.state.huge", lambda tensor: seen.append(tensor) or tensor)
    config = replace(DENSE, pattern="*-" * 8)
    state = State.empty(config, slots=slots, blocks=8)
    assert any(one is state.k[0] for one in seen) == laid


def empty_state(config, slots, dtype=torch.float64):
    state = State.empty(config, slots=slots, blocks=60, block_size=4, dtype=dtype)
    for layer in state.ssm:
        state.ssm[layer] = torch.randn_like(state.ssm[layer]).to(
            dtype
        )  # leftovers, which a fresh sequence must not see
        state.conv[layer].normal_()
    return state


@pytest.mark.parametrize("config", [HYBRID, DENSE], ids=["hybrid", "dense"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999))
def test_any_split_into_steps_equals_one_pass(config, seed):
    model, length, dice = random_model(config), 15, random.Random(seed)
    tokens = torch.randint(0, 50, (3, length), generator=torch.Generator().manual_seed(1))
    whole = model(tokens)
    state, slots = empty_state(config, 4), torch.tensor([2, 0, 3])
    table = torch.randperm(60, generator=torch.Generator().manual_seed(2))[:12].view(3, 4)
    done, outputs = [0, 0, 0], [[], [], []]
    while min(done) < length:
        take = [min(length - n, dice.choice([0, 1, 1, 2, 6])) for n in done]
        active = sorted((i for i in range(3) if take[i]), key=lambda i: not (take[i] == 1 and done[i] > 0))
        if not active:
            continue
        row = torch.cat([tokens[i, done[i] : done[i] + take[i]] for i in active])
        layout = Layout.of(
            [take[i] for i in active], [done[i] for i in active], slots=slots[active], block_table=table[active]
        )
        with torch.no_grad():
            logits = model.head(model(row, layout, state))
        for i, part in zip(active, logits.split([take[i] for i in active]), strict=True):
            outputs[i].append(part)
            done[i] += take[i]
    for i in range(3):
        torch.testing.assert_close(torch.cat(outputs[i]), whole[i], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", [HYBRID, DENSE], ids=["hybrid", "dense"])
def test_the_whole_network_agrees_with_the_reference_operations(config):
    model = random_model(config)
    tokens = torch.randint(0, 50, (2, 9))
    fast = model(tokens)
    with ops.using("reference"):
        true = model(tokens)
    torch.testing.assert_close(fast, true, rtol=1e-10, atol=1e-10)


def test_every_parameter_gets_a_gradient_and_bfloat16_keeps_three_in_float32():
    for config in (HYBRID, DENSE):
        model = random_model(config)
        model(torch.randint(0, 50, (2, 9))).pow(2).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    half = LanguageModel(HYBRID, dtype=torch.bfloat16)
    single = {name.rpartition(".")[2] for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert single == {"A_log", "D", "dt_bias"}


def test_rows_pick_hidden_states_and_a_tied_head_has_one_name():
    model = random_model(DENSE)
    tokens, rows = torch.randint(0, 50, (9,)), torch.tensor([3, 8])
    picked, every = model(tokens, Layout.of([4, 5], rows=rows)), model(tokens, Layout.of([4, 5]))
    torch.testing.assert_close(picked, every[rows], rtol=0, atol=1e-14)  # the last feed-forward reads these rows alone
    assert model(tokens, Layout.of([4, 5], rows=rows[:0])).shape == (0, 24)
    assert "head.weight" not in model.state_dict()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embeddings.weight.zero_()
    assert twin(tokens[None]).abs().max() == 0 and model(tokens[None]).abs().max() > 0


def test_initialisation_follows_the_seed_and_the_stated_ranges():
    first, again, other = (LanguageModel(HYBRID).initialise(seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.embeddings.weight, other.embeddings.weight)
    mixer = first.layers[0].mixer
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert (mixer.A_log.exp() >= 1).all() and (mixer.A_log.exp() <= 16).all()
    assert (dt > 0.0009).all() and (dt < 0.11).all() and (mixer.D == 1).all()
    assert abs(first.embeddings.weight.std().item() - 0.02) < 0.002
    assert abs(mixer.out_proj.weight.std().item() - 0.02 / 3) < 0.001


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pattern": "M-x"}, "'x' at layer 2"),
        ({"pattern": ""}, "pattern is empty"),
        ({"mamba_num_heads": 7}, "not divisible by n_groups 2"),
        ({"num_key_value_heads": 4}, "not divisible by num_key_value_heads 4"),
        ({"intermediate_size": 0}, "set intermediate_size"),
        ({"mlp": "relu"}, "relu2"),
        ({"rope_theta": 1e4, "rope_fraction": 0.4}, "rope_fraction"),
        ({"time_step_limit": (1.0, 0.5)}, "time_step_limit"),
    ],
)
def test_impossible_networks_are_refused_in_the_users_words(change, words):
    values = {f: getattr(HYBRID, f) for f in HYBRID.__dataclass_fields__} | change
    with pytest.raises(UserError, match=words):
        ModelConfig(**values)


@pytest.mark.parametrize("token", [-1, 64])
def test_tokens_outside_the_vocabulary_are_named(token):
    model = LanguageModel(ModelConfig(pattern="-", vocab_size=64, hidden_size=8, intermediate_size=8)).initialise(0)
    with pytest.raises(UserError, match=f"{token}.*set each from 0 to 63"):
        model(torch.tensor([[5, token]]))


@pytest.mark.parametrize("pattern", ["M-*-", "*-M", "M-*", "--"])
def test_rows_that_are_wanted_are_those_of_all(pattern):
    """With a state, which is the same whatever is wanted, and without one."""
    config = replace(HYBRID, pattern=pattern)
    model, tokens = LanguageModel(config).initialise(0), torch.arange(40)
    cut = {"slots": torch.tensor([1, 0]), "block_table": torch.arange(16).view(2, 8)}

    def read(past, **rows):
        state = State.empty(config, slots=2, blocks=16)
        for side in (state.ssm, state.conv, state.k, state.v):
            for tensor in side.values():
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 7 / 7)
        return model(tokens, Layout.of([25, 15], past, **cut, **rows), state), state

    with torch.inference_mode():
        for past in ([0, 0], [7, 0]):
            whole, state = read(past)
            for rows in ([24, 39], [3], []):
                some, after = read(past, rows=torch.tensor(rows, dtype=torch.int64))
                torch.testing.assert_close(some, whole[rows], rtol=0, atol=2e-6)
                for side, other in ((state.ssm, after.ssm), (state.conv, after.conv), (state.k, after.k)):
                    for layer, tensor in side.items():
                        torch.testing.assert_close(tensor, other[layer], rtol=0, atol=2e-6)
    whole, rows = model(tokens, Layout.of([25, 15])), torch.tensor([24, 2, 39])
    some = model(tokens, Layout.of([25, 15], rows=rows))
    torch.testing.assert_close(some, whole[rows], rtol=0, atol=2e-6)
    found = [torch.autograd.grad(y.sum(), list(model.parameters()), allow_unused=True) for y in (some, whole[rows])]
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_prompts_are_read_with_fewer_multiplications(monkeypatch):
    """From the model to the products: with a state and without gradients, all sizes counted large here."""
    if cpu.isa() in (None, "baseline"):
        pytest.skip("no native products here")
    model, asked = LanguageModel(HYBRID).initialise(0), []
    monkeypatch.setattr(matmul, "LEAST", 1)
    monkeypatch.setattr(matmul, "FAST", ((1, 1, 1), (1, 1, 1)))
    project = matmul.project
    monkeypatch.setattr(matmul, "project", lambda *v: asked.append(v[3]) or project(*v))
    layout = Layout.of([40], [0], slots=torch.tensor([0]), block_table=torch.arange(8)[None])
    tokens = torch.arange(40)
    with torch.inference_mode():
        read = model(tokens, layout, State.empty(HYBRID, slots=1, blocks=8))
        projections = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
        assert asked == [2] * projections
        torch.testing.assert_close(read, model(tokens, Layout.of([40])), rtol=0, atol=1e-4)
    assert not any(asked[projections:])  # not without a state
