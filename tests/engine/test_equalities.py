"""However an answer was computed (in chunks, in a crowd, preempted, in any order), it is the one-pass answer.

Teacher-forced log-probabilities within 1e-4 in float32; greedy tokens equal wherever the best leads by more than 2e-4.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.engine import Engine, Sampling
from whimbrel.model import Layout

TOLERANCE, GAP = 1e-4, 2e-4
GREEDY = Sampling(max_tokens=12, logprobs=2, ignore_eos=True)
DRAWN = Sampling(max_tokens=12, logprobs=2, ignore_eos=True, temperature=1.0, seed=11)


def prompts_of(lengths, seed=0):
    numbers = random.Random(seed)
    return [[numbers.randrange(64, 320) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def one_pass(model, prompt, ids):
    """Log-probabilities [len(ids), V] of every next token by one plain forward without a state."""
    tokens = torch.tensor([*prompt, *ids[:-1]])
    hidden = model(tokens, Layout.of([len(tokens)]))
    return model.head(hidden[len(prompt) - 1 :]).log_softmax(-1)


def check(model, prompt, answer, greedy):
    """Log-probabilities are those of one pass, and a greedy answer took the best token wherever that is clear."""
    reference = one_pass(model, prompt, answer.ids)
    chosen = reference[torch.arange(len(answer.ids)), torch.tensor(answer.ids)]
    assert (torch.tensor(answer.logprobs) - chosen).abs().max() < TOLERANCE
    best = reference.topk(2)
    if greedy:
        clear = (best.values[:, 0] - best.values[:, 1] > GAP).tolist()
        assert all(
            token == top or not sure
            for token, top, sure in zip(answer.ids, best.indices[:, 0].tolist(), clear, strict=True)
        )
        assert any(clear)


def alone(model, tokenizer, prompts, sampling):
    """Each prompt in an engine of its own, prefilled in one piece."""
    return [
        next(Engine(model, tokenizer, max_sequences=1, kv_tokens=512).generate([prompt], sampling))
        for prompt in prompts
    ]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    max_sequences=st.integers(1, 5),
    prefill_tokens=st.integers(1, 50),
    block_size=st.sampled_from([1, 4, 16]),
    kv_tokens=st.sampled_from([64, 96, 400]),
)
def test_any_batch_any_split_any_memory_gives_the_one_pass_answer(
    model, tokenizer, sampling, lengths, max_sequences, prefill_tokens, block_size, kv_tokens
):
    prompts = prompts_of(lengths)
    engine = Engine(
        model,
        tokenizer,
        max_sequences=max_sequences,
        kv_tokens=kv_tokens,
        block_size=block_size,
        prefill_tokens=prefill_tokens,
    )
    answers = list(engine.generate(prompts, sampling))
    assert [answer.index for answer in answers] == list(range(len(prompts)))
    for prompt, answer, lone in zip(prompts, answers, alone(model, tokenizer, prompts, sampling), strict=True):
        check(model, prompt, answer, sampling is GREEDY)
        assert answer.ids == lone.ids
    assert engine._running().pool.free_slots == max_sequences
    assert engine._running().pool.free_blocks == engine._running().pool.blocks


def test_prefill_and_decode_equal_one_pass_for_each_length(model, tokenizer):
    """Lengths around the block, the prefill and the convolution; a state taken one token late would show."""
    for length in (1, 3, 4, 16, 17, 33):
        (prompt,) = prompts_of([length], seed=length)
        for prefill_tokens in (1, 3, 64):
            engine = Engine(model, tokenizer, max_sequences=1, kv_tokens=64, prefill_tokens=prefill_tokens)
            check(model, prompt, next(engine.generate([prompt], GREEDY)), greedy=True)


def test_what_slots_and_blocks_held_before_is_never_read(model, tokenizer):
    prompts = prompts_of([3, 21, 40])
    engine = Engine(model, tokenizer, max_sequences=3, kv_tokens=256, prefill_tokens=16).start()
    state = engine._running().pool.state
    for kind in (state.conv, state.ssm, state.k, state.v):
        for tensor in kind.values():
            tensor.fill_(float("nan"))
    for prompt, answer in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        check(model, prompt, answer, greedy=True)


def test_preempted_equals_undisturbed(hybrid, tokenizer):
    prompts = prompts_of([9, 10, 11, 12])
    engine = Engine(hybrid, tokenizer, max_sequences=4, kv_tokens=56, block_size=4)
    sequences = [engine.add(prompt, DRAWN, index)[0] for index, prompt in enumerate(prompts)]
    while any(sequence.finish is None for sequence in sequences):
        engine.step()
    assert sum(sequence.preempted for sequence in sequences) > 0, "the memory was meant to be too small"
    assert sequences[0].preempted == 0, "the oldest is never disturbed"
    for prompt, sequence, lone in zip(prompts, sequences, alone(hybrid, tokenizer, prompts, DRAWN), strict=True):
        check(hybrid, prompt, sequence.answer(), greedy=False)
        assert sequence.answer().ids == lone.ids


def test_the_order_and_the_time_of_arrival_do_not_matter(model, tokenizer):
    prompts = prompts_of([5, 30, 2, 17, 9])
    expected = [answer.ids for answer in alone(model, tokenizer, prompts, DRAWN)]
    for seed in range(3):
        order = random.Random(seed).sample(range(5), 5)
        engine = Engine(model, tokenizer, max_sequences=3, kv_tokens=256, prefill_tokens=8)
        sequences = {}
        for place in order:
            (sequences[place],) = engine.add(prompts[place], DRAWN)
            for _ in range(random.Random(seed + place).randrange(4)):
                engine.step()
        while any(sequence.finish is None for sequence in sequences.values()):
            engine.step()
        assert [sequences[place].answer().ids for place in range(5)] == expected


def test_seeds_belong_to_requests_and_samples_differ(model, tokenizer):
    (prompt, other) = prompts_of([12, 7])
    engine = Engine(model, tokenizer, max_sequences=6, kv_tokens=512)
    three = list(engine.generate([prompt], Sampling(max_tokens=10, temperature=1.0, seed=5, n=3, ignore_eos=True)))
    assert [answer.sample for answer in three] == [0, 1, 2]
    assert len({answer.ids for answer in three}) == 3, "samples differ"
    mixed = [Sampling(max_tokens=10, temperature=1.0, seed=seed, n=3, ignore_eos=True) for seed in (9, 5)]
    again = list(engine.generate([other, prompt], mixed))
    assert [answer.ids for answer in again[3:]] == [answer.ids for answer in three], "batch mates change nothing"
    free = [
        next(engine.generate([prompt], Sampling(max_tokens=10, temperature=1.0, ignore_eos=True))) for _ in range(2)
    ]
    assert free[0].ids != free[1].ids, "without a seed each answer is another"
    same = next(engine.generate([prompt], Sampling(max_tokens=10, temperature=1.0, seed=free[0].seed, ignore_eos=True)))
    assert same.ids == free[0].ids, "the seed an answer names draws it again"


def test_score_equals_what_decoding_saw(model, tokenizer):
    prompts = prompts_of([1, 20, 7, 33])
    engine = Engine(model, tokenizer, max_sequences=4, kv_tokens=256, prefill_tokens=24)
    answers = list(engine.generate(prompts, DRAWN))
    scores = engine.score([*prompts, prompts[0]], [*(list(answer.ids) for answer in answers), []])
    for answer, score in zip(answers, scores, strict=False):
        assert score == pytest.approx(answer.logprobs, abs=TOLERANCE)
    assert scores[-1] == []


def test_new_weights_in_flight_are_computed_anew(tokenizer, hybrid, make_model):
    """Nothing of the old state is read: the rest of the answer is the new model's, given the tokens so far."""

    first, second = (make_model(hybrid.config, seed) for seed in (3, 4))
    prompts = prompts_of([10, 20])
    engine = Engine(first, tokenizer, max_sequences=2, kv_tokens=128)
    sequences = [engine.add(prompt, GREEDY, index)[0] for index, prompt in enumerate(prompts)]
    for _ in range(5):
        engine.step()
    first.load_state_dict(second.state_dict())
    first.touch()
    while any(sequence.finish is None for sequence in sequences):
        engine.step()
    for prompt, sequence in zip(prompts, sequences, strict=True):
        ids, at = sequence.answer().ids, 5
        reference = one_pass(second, prompt, ids)[at:]
        chosen = reference[torch.arange(len(ids) - at), torch.tensor(ids[at:])]
        assert (torch.tensor(sequence.answer().logprobs[at:]) - chosen).abs().max() < TOLERANCE
        assert sequence.preempted == 1
