"""A step of decoding in one native call, against the model in `ops/torch`: hidden state and all that it writes.

In float32, with weights of 32 or 16 bits: 2e-5 of the largest value. With whole numbers the twin rounds activations
alike, but a last bit that differs before rounding becomes a whole step, 1/127, after it, and goes on from layer to
layer: 1e-2 of the largest value, and 1e-3 in the mean square.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import ISAS, gap, instruction_set
from test_rows import rounded

from whimbrel import ops
from whimbrel.model import LanguageModel, Layout, ModelConfig, State
from whimbrel.model.linear import pack_model
from whimbrel.ops import cpu, vectorised
from whimbrel.ops.packed import Packed, unpack

pytestmark = pytest.mark.skipif(cpu.load()[0] is None, reason="the native library is not built here")

MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
NETWORKS = {
    "hybrid": ModelConfig("M-*-M", 50, 64, 96, **HEADS, **MAMBA),
    "qwen": ModelConfig("*-*-", 50, 64, 96, "swiglu", **HEADS, qk_norm=True, rope_theta=1e4),
    "nemotron-4": ModelConfig("*-", 50, 64, 96, **HEADS, rope_theta=1e4, rope_fraction=0.5, norm="layernorm1p"),
}
ODD = {
    "plain": ModelConfig("*-*-", 50, 24, 40, num_attention_heads=4, num_key_value_heads=4, head_dim=7),
    "biased": ModelConfig(
        "*-M", 50, 33, 41, "swiglu", True, 7, 1, 10, attention_bias=True, rope_theta=1e4, rope_fraction=0.6,
        mamba_num_heads=3, mamba_head_dim=5, ssm_state_size=11, n_groups=1, conv_kernel=3, mamba_bias=True,
    ),
    "no bias, one tap": ModelConfig(
        "M", 50, 24, mamba_num_heads=6, mamba_head_dim=3, ssm_state_size=9, n_groups=3, conv_kernel=1, conv_bias=False,
        time_step_limit=(0.01, 0.5),
    ),
}  # fmt: skip


def random_model(config, bits=32, seed=0):
    """No parameter is trivial."""
    model, g = LanguageModel(config).initialise(seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
    if bits != 32:
        pack_model(model, bits)
    return model


def place(sequences, seed=1, past=None):
    """pasts, tokens, slots and a table of blocks in any order."""
    g = torch.Generator().manual_seed(seed)
    past = torch.randint(1, 200, (sequences,), generator=g).tolist() if past is None else past
    table = torch.randperm(50 * sequences, generator=g).view(sequences, 50)
    return (
        past,
        torch.randint(0, 50, (sequences,), generator=g),
        torch.randperm(sequences + 2, generator=g)[:sequences],
        table,
    )


def step(model, past, tokens, slots, table, kv_dtype=torch.float32):
    """One step from a random state: hidden state, and the state after."""
    room = {"slots": len(past) + 2, "blocks": table.numel(), "block_size": 4}
    state = State.empty(model.config, **room, dtype=model.dtype, kv_dtype=kv_dtype)
    held = [*state.conv.values(), *state.ssm.values(), *state.k.values(), *state.v.values()]
    for pool in held:
        pool.copy_(torch.randn(pool.shape, generator=torch.Generator().manual_seed(1)))
    with torch.inference_mode():
        hidden = model(tokens, Layout.of([1] * len(past), past, slots=slots, block_table=table), state)
    return [hidden, *(pool.float() for pool in held if pool.numel())]


def agree(model, sequences, tolerance, kv_dtype=torch.float32, past=None):
    where = place(sequences, past=past)
    with ops.using("torch"):
        expected = step(model, *where, kv_dtype)
    for isa in ISAS:
        with instruction_set(isa):
            got = step(model, *where, kv_dtype)
            assert model.decoder.step is not None, "it ran natively"
        for y, e in zip(got, expected, strict=True):
            assert gap(y, e) < tolerance, isa
            assert (y - e).norm() < max(tolerance / 10, 2e-5) * e.norm(), isa


@pytest.mark.parametrize("name", [*NETWORKS, *ODD])
@pytest.mark.parametrize("sequences", [1, 3, 17])
def test_float32_weights(name, sequences):
    agree(random_model({**NETWORKS, **ODD}[name]), sequences, 2e-5)


@pytest.mark.parametrize("name", [*NETWORKS, *ODD])
@pytest.mark.parametrize("sequences", [1, 9])
def test_float16_weights(name, sequences):
    agree(random_model({**NETWORKS, **ODD}[name], 16), sequences, 2e-5)


@settings(max_examples=40, deadline=None)
@given(
    pattern=st.text("M*-", min_size=1, max_size=4),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 90)),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 10), st.sampled_from([None, 0.5, 1.0])),
    mamba=st.tuples(*[st.integers(1, top) for top in (3, 3, 20, 40, 5)]),
    kinds=st.tuples(
        st.sampled_from(["relu2", "swiglu"]), st.sampled_from(["rmsnorm", "layernorm1p"]), *3 * [st.booleans()]
    ),
    past=st.lists(st.integers(1, 199), min_size=1, max_size=9),
    bits=st.sampled_from([32, 16]),
)
def test_any_network_at_any_place(pattern, widths, heads, mamba, kinds, past, bits):
    kv_heads, shared, width, turned = heads
    mlp, norm, biased, tied, qk_norm = kinds
    config = ModelConfig(
        pattern, 50, *widths, mlp=mlp, norm=norm, tie_embeddings=tied, qk_norm=qk_norm,
        num_attention_heads=kv_heads * shared, num_key_value_heads=kv_heads, head_dim=4 * width,
        rope_theta=turned and 1e4, rope_fraction=turned or 1.0, mlp_bias=biased, attention_bias=biased,
        n_groups=mamba[0], mamba_num_heads=mamba[0] * mamba[1], mamba_head_dim=mamba[2], ssm_state_size=mamba[3],
        conv_kernel=mamba[4], conv_bias=biased, mamba_bias=biased,
    )  # fmt: skip
    agree(random_model(config, bits), len(past), 1e-4, past=past)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("sequences", [1, 4, 11, 16])
@pytest.mark.parametrize("bits", [8, 4])
def test_whole_numbers(name, sequences, bits, monkeypatch):
    def linear(x, weight, bias=None):
        if isinstance(weight, Packed):
            x, weight = (x if x.dim() != 2 else rounded(x).float()), unpack(weight)
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(vectorised, "linear", linear)
    agree(random_model(NETWORKS[name], bits), sequences, 1e-2)


@pytest.mark.parametrize("name", ["hybrid", "qwen", "plain", "biased"])
def test_keys_and_values_in_float16(name):
    # The twin reads keys and values of 16 bits with weights in float32, as the library does. 1e-3: the present token's
    # are rounded from numbers whose last bits differ.
    agree(random_model({**NETWORKS, **ODD}[name]), 3, 1e-3, torch.float16)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_threads_and_repeats_change_no_bit(bits):
    model, where, before, results = random_model(NETWORKS["hybrid"], bits), place(5), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(step(model, *where))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(y, z) for y, z in zip(result, results[0], strict=True))


@pytest.mark.parametrize("length", [5000, 17000])
def test_a_long_context_in_pieces(length):
    """Beyond 16,384 tokens a piece is longer than the 512 whose weights are held at once."""
    model, blocks = random_model(NETWORKS["qwen"]), length // 4 + 1
    past, tokens, slots = [length, 130], torch.tensor([3, 4]), torch.tensor([0, 1])
    table = torch.randperm(2 * blocks, generator=torch.Generator().manual_seed(0)).view(2, blocks)
    with ops.using("torch"):
        expected = step(model, past, tokens, slots, table)
    for isa in ISAS:
        with instruction_set(isa):
            assert gap(step(model, past, tokens, slots, table)[0], expected[0]) < 2e-5, isa


def test_a_state_where_another_was_is_told_anew():
    """Memory that was freed comes back with other blocks or types: addresses alone do not say what lies there."""
    model, where = random_model(NETWORKS["qwen"]), place(2)
    room = {"slots": 4, "blocks": 100, "block_size": 4, "dtype": torch.float32}
    first = State.empty(model.config, **room)
    pools = [pool.view(-1) for side in (first.k, first.v) for pool in side.values()]
    for kv_dtype, size in ((torch.float32, 4), (torch.float32, 8), (torch.float16, 4), (torch.float32, 4)):
        state = State.empty(model.config, **room | {"block_size": size, "blocks": 400 // size}, kv_dtype=kv_dtype)
        sides = [(side, index) for side in (state.k, state.v) for index in side]
        for (side, index), pool in zip(sides, pools, strict=True):
            side[index] = pool.view(kv_dtype)[: side[index].numel()].view(side[index].shape)
        results = []
        for form in ("torch", "cpu"):
            for side, index in sides:
                side[index].copy_(torch.randn(side[index].shape, generator=torch.Generator().manual_seed(1)))
            past, tokens, slots, table = where
            layout = Layout.of([1, 1], past, slots=slots, block_table=table % (400 // size))
            with torch.inference_mode(), ops.using(form):
                results.append(model(tokens, layout, state))
        assert model.decoder.step is not None and gap(*results) < 1e-3, (kv_dtype, size)


def test_a_copied_or_changed_model_decodes_with_its_own_weights():
    model, where = random_model(NETWORKS["hybrid"], 8), place(2)
    first = step(model, *where)[0]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layers[0].mixer.norm_weight.mul_(2)
        twin.layers[1].mixer.down_proj = torch.nn.Linear(96, 64, bias=False)
        twin.layers[2].mixer.k_proj.weight.scales = twin.layers[2].mixer.k_proj.weight.scales * 3
        twin.embeddings.weight.codes = twin.embeddings.weight.codes.flip(0)
    assert torch.equal(step(model, *where)[0], first)
    with ops.using("torch"):
        expected = step(twin, *where)[0]
    assert gap(step(twin, *where)[0], expected) < 0.05 < gap(first, expected)


def test_what_the_library_does_not_have_takes_the_general_path():
    class Other(torch.nn.Linear):
        pass

    model, where = random_model(NETWORKS["hybrid"]), place(2)
    model.layers[1].mixer.up_proj = Other(64, 96, bias=False)
    step(model, *where)
    assert model.decoder.step is None
    double = random_model(NETWORKS["qwen"]).double()
    assert step(double, *where, torch.float64)[0].dtype == torch.float64
    assert double.decoder.step is None
