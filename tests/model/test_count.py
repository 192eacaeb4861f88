"""Run: pytest tests/model/test_count.py. What is counted from a config equals what is built, kept and allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from whimbrel import ops
from whimbrel.errors import UserError
from whimbrel.model import count, fewbits
from whimbrel.model.config import ModelConfig
from whimbrel.model.language import LanguageModel
from whimbrel.model.layout import Layout
from whimbrel.model.linear import matrices, place
from whimbrel.model.presets import preset
from whimbrel.model.state import State
from whimbrel.ops.packed import round_to_nearest

HYBRID = replace(
    preset("hybrid-290m"),
    pattern="M-*-M",
    vocab_size=64,
    hidden_size=96,
    intermediate_size=320,
    mamba_num_heads=8,
    mamba_head_dim=32,
    ssm_state_size=48,
    n_groups=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
DENSE = replace(HYBRID, pattern="*-*-", mlp="swiglu", qk_norm=True, rope_theta=1e4, tie_embeddings=True)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    few = st.integers(1, 3)
    groups, keys = draw(few), draw(few)
    return ModelConfig(
        pattern=draw(st.text("M*-", min_size=1, max_size=6)),
        vocab_size=draw(st.integers(2, 40)),
        hidden_size=draw(st.integers(1, 24)),
        intermediate_size=draw(st.integers(1, 24)),
        mlp=draw(st.sampled_from(["relu2", "swiglu"])),
        mlp_bias=draw(st.booleans()),
        num_attention_heads=keys * draw(few),
        num_key_value_heads=keys,
        head_dim=2 * draw(few),
        attention_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        mamba_num_heads=groups * draw(few),
        mamba_head_dim=draw(few),
        ssm_state_size=draw(few),
        n_groups=groups,
        conv_kernel=draw(st.integers(1, 4)),
        conv_bias=draw(st.booleans()),
        mamba_bias=draw(st.booleans()),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm1p"])),
        tie_embeddings=draw(st.booleans()),
    )


def role(name: str, config: ModelConfig) -> str:
    top, _, rest = name.partition(".")
    if top in ("embeddings", "head"):
        return {"embeddings": "embedding", "head": "head"}[top]
    if top == "norm_f" or rest.partition(".")[2].startswith("norm."):
        return "norm"
    return {"M": "mamba", "*": "attention", "-": "mlp"}[config.pattern[int(rest.partition(".")[0])]]


@settings(max_examples=60, deadline=None)
@given(configs())
def test_parameters_by_role_are_those_built(config: ModelConfig) -> None:
    built: Counter[str] = Counter(dict.fromkeys(("embedding", "head", "mamba", "attention", "mlp", "norm"), 0))
    model = LanguageModel(config, device="meta", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        built[role(name, config)] += parameter.numel()
    assert count.parameters(config) == dict(built)
    assert count.weights_bytes(config, "bfloat16") == sum(p.nbytes for p in model.parameters())


@settings(max_examples=40, deadline=None)
@given(configs(), st.integers(1, 3), st.integers(1, 4), st.sampled_from(["bfloat16", "float32"]))
def test_state_and_kv_are_those_allocated(config: ModelConfig, batch: int, blocks: int, dtype: str) -> None:
    state = State.empty(
        config, slots=batch, blocks=blocks * batch, block_size=16, dtype=getattr(torch, dtype), device="meta"
    ).bytes()
    assert count.state_bytes(config, batch, dtype) == state["conv"] + state["ssm"]
    assert count.kv_bytes(config, 16 * blocks, batch, dtype) == state["kv"]


@pytest.mark.parametrize("config", [HYBRID, DENSE], ids=["hybrid", "dense"])
def test_matmul_flops_are_those_of_the_projections(config: ModelConfig) -> None:
    """torch counts the products of all nn.Linear and of the head; that must be `matmul` + `head` exactly."""
    model, tokens = LanguageModel(config).initialise(0), 48
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for layer in model.layers:
            for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
                linear(torch.zeros(tokens, linear.in_features))
        model.head(torch.zeros(tokens, config.hidden_size))
    parts = count.flops(config, 1)
    assert counter.get_total_flops() == tokens * (parts["matmul"] + parts["head"])


def test_attention_flops_are_those_of_the_scores() -> None:
    q, k = torch.zeros(1, 4, 1, 32), torch.zeros(1, 4, 100, 32)
    with FlopCounterMode(display=False) as counter:
        torch.matmul(torch.matmul(q, k.transpose(2, 3)), k)
    assert count.flops(HYBRID, 100)["attention"] == counter.get_total_flops()


def test_flops_by_hand() -> None:
    parts = count.flops(preset("nemotron-nano-9b-v2"), 16384)
    assert parts["attention"] == 4 * 4 * 5120 * 16384
    assert parts["scan"] == 27 * (5 * 10240 * 128 + 2 * 10240)
    assert parts["convolution"] == 27 * 2 * 12288 * 4
    config = preset("hybrid-tiny")
    assert count.flops_per_token(config, 5, training=True) == 3 * sum(count.flops(config, 5).values())
    assert count.mean_context([4]) == 2.5
    assert count.mean_context([1, 3]) == 1.75
    assert count.mean_context([]) == 0


@pytest.mark.parametrize("config", [HYBRID, DENSE, replace(HYBRID, vocab_size=50, intermediate_size=336)])
@pytest.mark.parametrize("dtype", ["int8", "int4", "int8/64", "fp8"])
def test_few_bits_as_a_gpu_holds_them(config: ModelConfig, dtype: str) -> None:
    """Codes, scales, rows that fill up, and 16 bits where the group does not divide: planned = built."""
    model = LanguageModel(config, dtype=torch.bfloat16).initialise(0)
    name, _, group = dtype.partition("/")
    for module, weight in matrices(model).items():
        if dtype != "fp8" and weight.shape[1] % int(group or 32) == 0:
            assert isinstance(weight, torch.Tensor)
            place(model, module, round_to_nearest(weight.detach(), int(name[3:]), int(group or 32)))
    (fewbits.to_fp8 if dtype == "fp8" else lambda m: fewbits.settle(m, torch.bfloat16))(model)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert count.weights_bytes(config, dtype) == held < count.weights_bytes(config, "bfloat16")
    table = sum(tensor.nbytes for tensor in (*model.embeddings.parameters(), *model.embeddings.buffers()))
    moved = count.decode_bytes(config, 7, 3, dtype)
    assert moved["weights"] == held - (not config.tie_embeddings) * table + 3 * table // config.vocab_size
    assert {k: v for k, v in moved.items() if k != "weights"} == {
        k: v for k, v in count.decode_bytes(config, 7, 3, "bfloat16").items() if k != "weights"
    }
    more = count.activation_bytes(config, 512, 512, dtype) - count.activation_bytes(config, 512, 512, "bfloat16")
    largest = max(w.shape[0] * w.shape[1] for name, w in matrices(model).items() if name.startswith("layers"))
    assert more == (512 * config.intermediate_size if dtype == "fp8" else 2 * largest)


@given(config=configs())
@settings(deadline=None)
def test_fp8_of_any_shape(config: ModelConfig) -> None:
    model = LanguageModel(config, dtype=torch.bfloat16).initialise(0)
    fewbits.to_fp8(model)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert count.weights_bytes(config, "fp8") == held


def test_decode_bytes_of_published_roofline() -> None:
    """9B, mean context 16k: 16.6 GB of weights, 283 MB of state read and written, 268 MB of keys and values."""
    moved = count.decode_bytes(preset("nemotron-nano-9b-v2"), 16384)
    ssm = 27 * 10240 * 128 * 4
    assert round(moved["weights"] / 1e9, 1) == 16.6
    assert moved["state"] == 2 * (ssm + 27 * 12288 * 3 * 2)
    assert round(2 * ssm / 1e6) == 283
    assert moved["kv"] == 16385 * 16384
    assert count.decode_bytes(DENSE, 0, 3)["weights"] == count.weights_bytes(DENSE) + 3 * 96 * 2, "a tied table is read"


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(UserError, match=r"dtype is 'bf16'.*bfloat16"):
        count.weights_bytes(HYBRID, "bf16")


def allocated(work: Callable[[], object]) -> int:
    """Largest number of bytes that torch's CPU allocator holds for `work` at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("pattern", ["M", "-", "*", "M-*-M"])
@pytest.mark.parametrize("config", [HYBRID, DENSE], ids=["hybrid", "dense"])
def test_activations_of_a_prompt(config: ModelConfig, pattern: str) -> None:
    """Within 15 % of what torch allocates for the second chunk of a prompt, the mask of the CPU's kernel apart."""
    config = replace(config, pattern=pattern)
    model, tokens, past = LanguageModel(config).initialise(0), 256, 512
    state = State.empty(config, slots=1, blocks=48)
    slots, table = torch.tensor([0]), torch.arange(48)[None]

    def chunk(length: int, before: int) -> None:
        rows = None if pattern == "-" else torch.tensor([length - 1])  # which it would cut to before it begins
        layout = Layout.of([length], [before], slots=slots, block_table=table, rows=rows)
        model(torch.zeros(length, dtype=torch.int64), layout, state)

    with torch.inference_mode(), ops.using("torch"):
        chunk(past, 0)
        measured = allocated(lambda: chunk(tokens, past))
    mask = 13 * tokens * (tokens + past) if pattern == "*" else 0
    counted = count.activation_bytes(config, tokens, tokens + past, "float32")
    assert counted == pytest.approx(measured - mask, rel=0.15)
