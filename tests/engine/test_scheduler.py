"""Slots and blocks under arbitrary traffic: nothing is owned twice, nothing is lost, everybody finishes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.engine.pool import Pool
from whimbrel.engine.sampling import Sampling
from whimbrel.engine.scheduler import Scheduler
from whimbrel.engine.sequence import Sequence
from whimbrel.engine.thinking import Thinking
from whimbrel.model import ModelConfig

ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
MAMBA = {"mamba_num_heads": 2, "mamba_head_dim": 4, "ssm_state_size": 4}


def make_pool(pattern="M*", slots=3, kv_tokens=32, block_size=4):
    config = ModelConfig(pattern=pattern, vocab_size=8, hidden_size=8, intermediate_size=8, **ATTENTION, **MAMBA)
    return Pool(
        config, slots=slots, kv_tokens=kv_tokens, block_size=block_size, dtype=torch.float32, device=torch.device("cpu")
    )


def make_sequence(tokenizer, prompt, answer):
    thinking = Thinking(opened=False, budget=None, grace=0, encode=tokenizer.encode)
    sampling = Sampling(max_tokens=answer)
    return Sequence((70,) * prompt, sampling, 0, thinking, tokenizer.stream())


def check(pool, scheduler, sequences):
    """Every slot and block is either free or held by exactly one running sequence, and the table says what is held."""
    running = [sequence for sequence in sequences if sequence.slot is not None]
    assert running == scheduler.running, "in order of arrival"
    slots = [sequence.slot for sequence in running]
    blocks = [block for sequence in running for block in sequence.blocks]
    assert len(set(slots)) == len(slots) == pool.slots - pool.free_slots
    assert len(set(blocks)) == len(blocks) == pool.blocks - pool.free_blocks
    for sequence in running:
        assert pool._table[sequence.slot, : len(sequence.blocks)].tolist() == sequence.blocks
        assert len(sequence.blocks) >= pool.need(sequence.cached)


@given(st.data(), st.integers(1, 9), st.integers(1, 4), st.sampled_from(["M*", "M"]))
def test_any_traffic_keeps_the_books_and_comes_to_an_end(tokenizer, data, prefill_tokens, slots, pattern):
    pool = make_pool(pattern, slots)
    scheduler = Scheduler(pool, prefill_tokens)
    traffic = data.draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=8))
    sequences = [make_sequence(tokenizer, prompt, answer) for prompt, answer in traffic]
    waiting = list(sequences)
    pauses = data.draw(st.lists(st.integers(0, 6), min_size=len(waiting), max_size=len(waiting)))
    for _ in range(2000):
        while waiting and pauses[-len(waiting)] == 0:
            scheduler.add(waiting.pop(0))
        if waiting:
            pauses[-len(waiting)] -= 1
        work = scheduler.schedule()
        decodes = [count == 1 and sequence.cached > 0 and sequence.pending == 1 for sequence, count in work]
        assert decodes == sorted(decodes, reverse=True), "answers that continue come first"
        assert sum(count for (_, count), decode in zip(work, decodes, strict=True) if not decode) <= prefill_tokens
        assert all(len(sequence.blocks) >= pool.need(sequence.cached + count) for sequence, count in work)
        check(pool, scheduler, sequences)
        for sequence, count in work:
            sequence.cached += count
            if not sequence.pending:
                sequence.append(71, frozenset())
            if sequence.finish is not None:
                scheduler.remove(sequence)
        if not waiting and not scheduler.busy:
            break
    assert all(
        sequence.finish == "length" and sequence.written == sequence.sampling.max_tokens for sequence in sequences
    )
    assert (pool.free_slots, pool.free_blocks) == (pool.slots, pool.blocks)


def test_the_youngest_gives_way_and_comes_back_first(tokenizer):
    pool = make_pool(slots=3, kv_tokens=28)
    scheduler = Scheduler(pool, 64)
    old, young, later = (make_sequence(tokenizer, 10, 12) for _ in range(3))
    for sequence in (old, young):
        scheduler.add(sequence)
    scheduler.schedule()
    scheduler.add(later)
    for _ in range(4):
        for sequence in (old, young):
            if sequence.slot is not None:
                sequence.cached = len(sequence.tokens)
                sequence.append(71, frozenset())
        scheduler.schedule()
    assert old.slot is not None and young.slot is None and young.preempted == 1
    assert list(scheduler.waiting) == [young, later]
    scheduler.remove(old)
    assert [sequence for sequence, _ in scheduler.schedule()] == [young]


def test_with_ample_memory_a_sequence_lies_in_one_piece_however_many_grow(tokenizer):
    pool = make_pool(slots=3, kv_tokens=240)
    sequences = [make_sequence(tokenizer, 5, 50) for _ in range(3)]
    assert all(pool.admit(sequence) for sequence in sequences)
    for _ in range(50):
        for sequence in sequences:
            sequence.tokens.append(71)
            assert pool.grow(sequence)
    assert all(after - before == 1 for s in sequences for before, after in zip(s.blocks, s.blocks[1:], strict=False))


def test_a_model_without_attention_holds_any_length(tokenizer):
    pool = make_pool("M", slots=1, kv_tokens=4)
    sequence = make_sequence(tokenizer, 1000, 1)
    assert pool.admit(sequence) and sequence.blocks == [] and not pool.admit(make_sequence(tokenizer, 1, 1))
    slots, table = pool.places([sequence])
    assert slots.tolist() == [0] and table.shape == (1, 0)


def test_only_a_running_sequence_has_a_place(tokenizer):
    pool = make_pool()
    with pytest.raises(AssertionError):
        pool.places([make_sequence(tokenizer, 1, 1)])
