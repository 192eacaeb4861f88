"""Pools from memory: what an engine makes room for by itself, that it holds, and what it says where nothing fits."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.engine import Engine, Sampling, bench, memory
from whimbrel.engine.memory import MOST, Room, sizes
from whimbrel.engine.plan import plan
from whimbrel.engine.pool import Pool
from whimbrel.errors import UserError
from whimbrel.model import count
from whimbrel.model.presets import preset

NINE = preset("nemotron-nano-9b-v2")
GIB = 2**30


def held(config, sequences, kv_tokens, state_dtype="float32", dtype="bfloat16", block_size=16):
    """Bytes of a GPU's pool of these sizes, as they are built, the slot and the block of nobody among them."""
    where, kinds = torch.device("meta"), (getattr(torch, dtype), getattr(torch, state_dtype))
    pool = Pool(config, slots=sequences, kv_tokens=kv_tokens, block_size=block_size, dtype=kinds[0], device=where,
                spare=True, state_dtype=kinds[1])  # fmt: skip
    return sum(pool.state.bytes().values())


@given(
    st.sampled_from(["nemotron-nano-9b-v2", "nemotron-h-8b", "qwen3-8b", "hybrid-1m"]),
    st.integers(2**27, 2**37), st.sampled_from(["float32", "float16"]), st.sampled_from([16, 64]),
    st.sampled_from([64, 512, 4096]),
)  # fmt: skip
def test_what_is_chosen_fits_and_one_more_of_either_would_not(name, free, state_dtype, block_size, prefill_tokens):
    room = Room(preset(name), free, "bfloat16", state_dtype, block_size, prefill_tokens)
    try:
        sequences, kv_tokens = room.divide(None, None)
    except UserError:
        assert room.left(1) < room.block, "one sequence and a block fit, and were refused"
        return
    full = -(-room.config.max_position_embeddings // block_size) * block_size
    assert 1 <= sequences <= MOST and block_size <= kv_tokens <= sequences * full
    step = sequences * count.step_bytes(room.config, "bfloat16")
    built = held(room.config, sequences, kv_tokens, state_dtype, block_size=block_size)
    assert built + step < free
    if kv_tokens < sequences * full:
        assert room.left(sequences) < (kv_tokens // block_size + 1) * room.block, "a block more would fit"
    if 1 < sequences < MOST:
        deep = min(full, -(-memory.DEPTH // block_size) * block_size) // block_size
        whole = min(full // block_size, 3 * room.left(0) // 4 // room.block)
        need = max((sequences + 1) * deep, whole) * room.block
        assert kv_tokens // block_size >= max(sequences * deep, whole), "less than the depth that is expected"
        assert room.left(sequences + 1) < need, "a sequence more would fit"
    assert room.divide(sequences, None) == room.divide(sequences, kv_tokens) == (sequences, kv_tokens)
    assert room.divide(None, kv_tokens)[0] >= sequences


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8"])
@pytest.mark.parametrize("gib", [20, 40, 139])
def test_plan_says_what_the_9b_is_given_on_a_gpu(gib, dtype):
    made = plan(NINE, memory=gib * GIB, context=8192, dtype=dtype, reserve=GIB, state_dtype="float16")
    free = gib * GIB - GIB - count.weights_bytes(NINE, dtype)
    room = Room(NINE, int(free * memory.SHARE["cuda"]), "bfloat16", "float16")
    assert sizes(room, None, None, True) == (made.default_sequences, made.default_kv_tokens)
    assert f"by itself: {made.default_sequences} at once, {made.default_kv_tokens:,} tokens" in "\n".join(made.lines())
    assert (made.default_sequences == MOST) == (gib == 139) and made.default_sequences > 1
    assert plan(NINE, memory=GIB, context=64).default_sequences == 0


@pytest.mark.parametrize("mib", [40, 200])
def test_plan_says_what_an_engine_on_a_gpu_makes_room_for(monkeypatch, make_model, tokenizer, mib):
    config = replace(preset("hybrid-1m"), vocab_size=tokenizer.vocab_size)
    engine = Engine(make_model(config, 0), tokenizer)
    made = plan(config, memory=mib * 2**20, context=512, dtype="float32")
    weights = sum(tensor.nbytes for tensor in engine.model.parameters())
    monkeypatch.setattr("whimbrel.engine.engine.free_memory", lambda device: mib * 2**20 - weights)
    monkeypatch.setattr(engine, "device", torch.device("cuda"))
    assert engine.sizes() == (made.default_sequences, made.default_kv_tokens)
    assert 1 < made.default_sequences <= MOST
    assert held(config, *engine.sizes(), dtype="float32") < 0.9 * (mib * 2**20 - weights)


def test_an_engine_with_a_budget_keeps_to_it_and_answers(hybrid, tokenizer):
    budget = 20_000_000
    engine = Engine(hybrid, tokenizer, memory=budget, prefill_tokens=32)
    assert 1 < engine.max_sequences == engine._running().pool.slots < 32
    assert sum(engine._running().pool.state.bytes().values()) < budget
    assert [len(a.ids) for a in engine.generate([[70, 80]] * 40, Sampling(max_tokens=4, ignore_eos=True))] == [4] * 40
    assert Engine(hybrid, tokenizer).max_sequences == 16, "a CPU without a budget is as it was"
    assert Engine(hybrid, tokenizer, memory=budget, max_sequences=2, prefill_tokens=32).max_sequences == 2


def test_what_cannot_be_names_a_setting_and_a_value_that_works(hybrid, tokenizer):
    room = Room(NINE, 4 * GIB)
    with pytest.raises(
        UserError, match=r"max_sequences=500 take .* MiB each, but 4.00 GiB .*; set max_sequences to 2\d$"
    ) as found:
        room.divide(500, None)
    fits = int(str(found.value).rsplit(" ", 1)[1])
    assert room.divide(fits, None)[0] == fits
    with pytest.raises(UserError, match=rf"set max_sequences to {fits}$"):
        room.divide(fits + 1, None)
    with pytest.raises(UserError, match=r"kv_tokens=1000000 take 15.26 GiB, .*; set kv_tokens to \d+$") as found:
        room.divide(None, 1_000_000)
    most = int(str(found.value).rsplit(" ", 1)[1])
    assert room.divide(None, most) == (1, most)
    for less, word in (
        ({"prefill_tokens": 8192}, "prefill_tokens to 16"),
        ({"prefill_tokens": 16}, "state_dtype to float16"),
    ):
        tight = replace(room, **less)
        low, high = 0, 4 * tight.bytes
        while high - low > 1:  # the least that holds one
            middle = (low + high) // 2
            low, high = (low, middle) if replace(tight, bytes=middle).most(each=1) else (middle, high)
        assert replace(tight, bytes=high).divide(None, None)[0] == 1
        tight = replace(tight, bytes=low)
        with pytest.raises(UserError, match=f"one sequence takes .*; set {word}$"):
            tight.divide(None, None)
        name, _, value = word.partition(" to ")
        assert replace(tight, **{name: type(getattr(tight, name))(value)}).divide(None, None)[0] >= 1
    with pytest.raises(UserError, match=r"; set memory to \d+, or load weights of fewer bits") as found:
        Engine(hybrid, tokenizer, memory=1000).start()
    need = int(str(found.value).split("set memory to ")[1].split(",")[0])
    assert Engine(hybrid, tokenizer, memory=need).start().max_sequences == 1


def test_free_memory_of_a_gpu_counts_what_torch_keeps_and_a_limit_set_for_the_process(monkeypatch):
    given = {"mem_get_info": (30, 100), "memory_allocated": 40, "memory_reserved": 50,
             "get_per_process_memory_fraction": 1.0}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_memory(torch.device("cuda")) == 40
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5)
    assert memory.free_memory(torch.device("cuda")) == 10


def test_keys_beside_packed_weights_are_halves_as_bench_measures_them(tokenizer):
    model = bench.load("hybrid-tiny", "int8")
    engine = Engine(model, tokenizer, max_sequences=2, kv_tokens=64, report=lambda event: None)
    state = engine.start()._running().pool.state
    kinds = {pool.dtype for pools in (state.k, state.v) for pool in pools.values()}
    assert kinds == {model.kv_dtype} == {torch.float16}
    (answer,) = engine.generate([[5, 6, 7]], Sampling(temperature=0, max_tokens=5))
    assert answer.ids
