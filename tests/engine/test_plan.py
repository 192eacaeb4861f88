"""Run: pytest tests/engine/test_plan.py. The published memory table, the roofline, how the figures agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from whimbrel import ops
from whimbrel.engine.plan import BLOCK, Plan, plan, prompt_flops
from whimbrel.engine.sampler import Draw, sample
from whimbrel.engine.sampling import Sampling
from whimbrel.errors import UserError
from whimbrel.model import count
from whimbrel.model.language import LanguageModel
from whimbrel.model.layout import Layout
from whimbrel.model.presets import PRESETS, preset
from whimbrel.model.state import State

GIB = 2**30
NINE = preset("nemotron-nano-9b-v2")
CUT = replace(preset("nemotron-nano-12b-v2"), pattern=NINE.pattern)
A10G = 22.06 * GIB * 0.95  # the paper keeps 5 % for buffers
BUDGET = int(A10G - 1.3 * GIB)  # and 1.3 GiB for a vision encoder: 19.66 GiB


# Nano 2 report (arXiv 2508.14444), section 4, 131,072 tokens: parameters / 1e9; GiB of weights, KV, SSM, their sum.
ROWS = {
    "12B": (preset("nemotron-nano-12b-v2"), 12.310, 22.93, 3.00, 0.137, 26.07, False),
    "56 layers, full width": (CUT, 11.386, 21.21, 2.00, 0.132, 23.34, False),
    "9B": (NINE, 8.888, 16.56, 2.00, 0.132, 18.69, True),
    "4480/17920/112": (
        replace(CUT, hidden_size=4480, intermediate_size=17920, mamba_num_heads=112),
        *(8.923, 16.62, 2.00, 0.115, 18.74, True),
    ),
    "4800/15680/112": (
        replace(CUT, hidden_size=4800, intermediate_size=15680, mamba_num_heads=112),
        *(9.023, 16.81, 2.00, 0.115, 18.92, True),
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_the_papers_table(row: str) -> None:
    config, parameters, weights, kv, ssm, total, fits = ROWS[row]
    made = plan(config, memory=BUDGET, context=131_072)
    tail = config.count("M") * config.conv_channels * (config.conv_kernel - 1) * 2  # the table leaves the tails out
    assert round(made.parameters / 1e9, 3) == parameters
    assert made.weights_bytes / GIB == pytest.approx(weights, abs=0.0051)
    assert made.kv_bytes / GIB == kv
    assert round((made.state_bytes - tail) / GIB, 3) == ssm
    before_buffers = made.weights_bytes + made.kv_bytes + made.state_bytes - tail
    assert before_buffers / GIB == pytest.approx(total, abs=0.0101)
    assert made.fits is fits
    assert made.largest_batch == fits


def test_the_papers_largest_batch() -> None:
    """8 sequences of 8k in, 16k out on one A10G, in vLLM. Ours holds 7 whole contexts, more when paged on demand."""
    made = plan(NINE, memory=int(A10G), context=24 * 1024)
    assert made.largest_batch == 7
    assert made.largest_batch_on_demand > 8


@pytest.mark.parametrize(
    ("batch", "milliseconds", "tokens_per_second"), [(1, 3.57, 280), (64, 10.8, 5.9e3), (256, 32.9, 7.8e3)]
)
def test_decode_floor_of_a_published_gpu(batch: int, milliseconds: float, tokens_per_second: float) -> None:
    """4.8 TB/s and a context of 16k: weights without the embedding, KV once, fp32 state twice."""
    roomy = plan(NINE, memory=10**12, context=16384, bandwidth=4.8e12)
    need = roomy.total_bytes + (batch - 1) * (roomy.kv_bytes + roomy.state_bytes + roomy.buffer_bytes)
    made = plan(NINE, memory=need, context=16384, bandwidth=4.8e12)
    assert made.largest_batch == batch
    assert made.decode_tokens_per_second_largest == pytest.approx(tokens_per_second, rel=0.01)
    assert made.decode_bytes_largest / 4.8e12 * 1e3 == pytest.approx(milliseconds, rel=0.01)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(PRESETS)),
    st.integers(1, 300_000),
    st.integers(1, 40),
    st.integers(10**6, 10**12),
    st.integers(0, 10**9),
)
def test_the_figures_agree(name: str, context: int, batch: int, memory: int, reserve: int) -> None:
    """The parts add up; the limits are exactly where `fits` turns."""

    def at(context: int, batch: int) -> Plan:
        return plan(preset(name), memory=memory, context=context, batch=batch, reserve=reserve)

    made = at(context, batch)
    parts = ("weights", "kv", "state", "activation", "buffer", "reserve")
    assert made.total_bytes == sum(getattr(made, f"{part}_bytes") for part in parts)
    assert made.fits == (batch <= made.largest_batch)
    assert made.largest_batch <= made.largest_batch_on_demand
    if made.largest_batch:
        assert at(context, made.largest_batch).fits
    assert not at(context, made.largest_batch + 1).fits
    assert made.largest_context is not None and made.largest_context % BLOCK == 0
    assert made.largest_context == 0 or at(made.largest_context, 1).fits
    assert not at(made.largest_context + BLOCK, 1).fits


def test_plan_is_what_gets_allocated() -> None:
    config, context, batch = preset("hybrid-1m"), 100, 3
    made = plan(config, memory=GIB, context=context, batch=batch)
    model = LanguageModel(config, device="meta", dtype=torch.bfloat16)
    state = State.empty(
        config, slots=batch, blocks=batch * 7, block_size=BLOCK, dtype=torch.bfloat16, device="meta"
    ).bytes()
    assert made.weights_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert made.kv_bytes == state["kv"]
    assert made.state_bytes == state["conv"] + state["ssm"]
    assert made.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_floors_take_the_longer_of_bytes_and_arithmetic() -> None:
    config = preset("hybrid-290m")
    free = plan(config, memory=GIB, context=1024, bandwidth=1e10)
    bound = plan(config, memory=GIB, context=1024, bandwidth=1e10, peak=1e9)
    assert free.decode_tokens_per_second == pytest.approx(1e10 / free.decode_bytes)
    assert free.prefill_seconds is None
    assert bound.prefill_seconds == pytest.approx(bound.prefill_flops / 1e9)
    assert bound.decode_tokens_per_second == pytest.approx(1e9 / count.flops_per_token(config, 1024))
    fast = plan(config, memory=GIB, context=1024, bandwidth=1e10, peak=1e20)
    assert fast.decode_tokens_per_second == free.decode_tokens_per_second
    assert fast.prefill_seconds is not None and fast.prefill_seconds > 2 * 0.5e9 / 1e10, (
        "weights are read for each chunk"
    )
    assert plan(config, memory=GIB, context=1024).decode_tokens_per_second is None


def test_without_attention_memory_does_not_grow() -> None:
    config = replace(preset("hybrid-tiny"), pattern="M-M-")
    short, long = (plan(config, memory=GIB, context=n) for n in (1024, 1_000_000))
    assert short.total_bytes == long.total_bytes
    assert long.kv_bytes == 0
    assert long.largest_context is None
    assert any("any for one sequence" in line for line in long.lines())


def test_context_beyond_training_is_a_warning() -> None:
    assert plan(NINE, memory=BUDGET, context=131_072).warnings == ()
    made = plan(NINE, memory=BUDGET, context=131_073)
    assert "max_position_embeddings=131,072" in made.warnings[0]
    assert made.warnings[0] in made.lines()[-1]


def test_lines_and_json_say_the_same() -> None:
    made = plan(NINE, memory=BUDGET, context=131_072, bandwidth=6e11, peak=1e14, name="nine")
    text = "\n".join(made.lines())
    for piece in ("nine: 8.888B", "27 Mamba-2", "16.56 GiB", "2.00 GiB", "19.66 GiB: fits", "600 GB/s", "100 TFLOP/s"):
        assert piece in text
    assert "does not fit" in "\n".join(plan(NINE, memory=GIB, context=64).lines())
    tree = json.loads(json.dumps(made.to_json()))
    wanted = {"parameters", "weights_bytes", "kv_bytes", "state_bytes", "total_bytes", "fits", "largest_batch"}
    assert wanted <= set(tree)
    assert (tree["parameters"], tree["fits"]) == (8_888_227_328, True)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("memory", 0), ("context", 0), ("batch", -1), ("prefill_tokens", 0), ("dtype", "bf16"), ("kv_dtype", "int3")],
)
def test_nonsense_names_the_setting(setting: str, value: object) -> None:
    given = {"memory": GIB, "context": 64} | {setting: value}
    with pytest.raises(UserError, match=f"{setting} is .*set {setting} to"):
        plan(NINE, **given)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("name", ["hybrid-1m", "dense-tiny"])
def test_serving_stays_within_the_plan(name: str) -> None:
    """Load, read prompts to their ends, decode and sample: torch holds at most the plan, and at least 0.85 of it.

    The vocabulary is wide, so that logits count. The masks of torch's CPU kernel for a prompt in pieces come on top.
    """
    config, context, batch, chunk = replace(preset(name), vocab_size=4096), 768, 3, 256
    made = plan(config, memory=GIB, context=context, batch=batch, dtype="float32", prefill_tokens=chunk)
    table = torch.arange(batch * context // BLOCK).view(batch, -1)
    slots = torch.arange(batch)

    def serve() -> None:
        model = LanguageModel(config).initialise(0)
        state = State.empty(config, slots=batch, blocks=table.numel(), block_size=BLOCK)
        for s in range(batch):
            for at in range(0, context - 1, chunk):
                n, one = min(chunk, context - 1 - at), slice(s, s + 1)
                last = torch.tensor([n - 1])
                layout = Layout.of([n], [at], slots=slots[one], block_table=table[one], rows=last)
                model(torch.zeros(n, dtype=torch.int64), layout, state)
        layout = Layout.of([1] * batch, [context - 1] * batch, slots=slots, block_table=table)
        hidden_SD = model(torch.zeros(batch, dtype=torch.int64), layout, state)
        sample(model.head(hidden_SD), [Draw(Sampling(temperature=1.0, top_p=0.9), 1, 0, s) for s in range(batch)])

    with torch.inference_mode(), ops.using("torch"):
        peak = allocated(serve)
    assert 0.85 * made.total_bytes < peak < made.total_bytes + 13 * chunk * context


def test_a_float16_state_takes_half_the_bytes_that_the_pool_takes():
    from whimbrel.model.state import State

    config = preset("nemotron-nano-9b-v2")
    wide, half = (
        plan(config, memory=80 * 2**30, context=1024, batch=4, state_dtype=kind) for kind in ("float32", "float16")
    )
    held = State.empty(config, slots=4, blocks=0, dtype=torch.bfloat16, ssm_dtype=torch.float16, device="meta").bytes()
    assert half.state_bytes == held["ssm"] + held["conv"]
    assert wide.state_bytes - half.state_bytes == held["ssm"] == wide.total_bytes - half.total_bytes
    assert wide.decode_bytes - half.decode_bytes == 2 * held["ssm"] // 4
    assert "4 sequences, float16" in "\n".join(half.lines())


@pytest.mark.parametrize("pattern", ["M-*-", "-*M", "M-*"])
def test_a_prompt_costs_the_products_that_reading_it_takes(pattern):
    """What the last token saves the others is what torch counts less when only that token is asked for."""
    config = replace(preset("hybrid-tiny"), pattern=pattern)
    model, context = LanguageModel(config).initialise(0), 40

    def operations(rows: torch.Tensor | None) -> float:
        state = State.empty(config, slots=1, blocks=4)
        table, slots = torch.arange(4)[None], torch.tensor([0])
        with FlopCounterMode(display=False) as counter:
            layout = Layout.of([context], [0], slots=slots, block_table=table, rows=rows)
            model.head(model(torch.zeros(context, dtype=torch.int64), layout, state))
        return float(counter.get_total_flops())

    with torch.inference_mode(), ops.using("torch"):
        saved = operations(None) - operations(torch.tensor([context - 1]))
    whole = context * sum(count.flops(config, count.mean_context([context])).values())
    assert whole - prompt_flops(config, context) == pytest.approx(saved, rel=1e-9)
