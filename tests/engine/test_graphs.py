"""Decoding through the buckets of graphs: on a CPU the same step unrecorded, on a GPU recorded."""

from dataclasses import replace

import pytest
import torch

from whimbrel import ops
from whimbrel.engine import Engine, Sampling
from whimbrel.engine.graphs import DecodeGraphs, bucket
from whimbrel.engine.sampler import Kinds, sample
from whimbrel.errors import UserError
from whimbrel.model import fewbits
from whimbrel.model.linear import pack_model

CUDA = torch.cuda.is_available()


def test_buckets_are_powers_of_two_up_to_the_most():
    assert [bucket(n, 1, 12) for n in (1, 2, 3, 5, 8, 9, 12)] == [1, 2, 4, 8, 8, 12, 12]
    assert bucket(0, 64, 100) == 64 and bucket(65, 64, 100) == 100 and bucket(1, 64, 3) == 3


def graphed(model, tokenizer, **settings):
    """An engine that decodes in buckets, on any device."""
    engine = Engine(model, tokenizer, **settings)
    pool = engine.start()._running().pool
    if engine._graphs is None:
        from whimbrel.engine.pool import Pool

        spare = Pool(
            model.config,
            slots=pool.slots,
            kv_tokens=pool.blocks * pool.block_size,
            block_size=pool.block_size,
            dtype=engine.dtype,
            device=engine.device,
            spare=True,
        )
        engine._scheduler.pool = spare
        engine._graphs = DecodeGraphs(model, spare)
    return engine


@pytest.mark.parametrize("form", ["native", "torch"])
def test_answers_are_those_of_the_plain_path(model, tokenizer, form):
    """Five sequences of unlike lengths in buckets, some ending before others, blocks running out in between."""
    prompts = [[70 + i] * n for i, n in enumerate((1, 30, 7, 90, 2))]
    settings = [Sampling(max_tokens=n, ignore_eos=True) for n in (40, 3, 25, 12, 40)]

    def run(engine):
        queued = [engine.add(p, s, i)[0] for i, (p, s) in enumerate(zip(prompts, settings, strict=True))]
        while any(sequence.finish is None for sequence in queued):
            engine.step()
        return [sequence.answer().ids for sequence in queued]

    with ops.using("torch" if form == "torch" else "cpu"):
        plain = run(Engine(model, tokenizer, max_sequences=5, kv_tokens=192))
        engine = graphed(model, tokenizer, max_sequences=5, kv_tokens=192)
        mine = run(engine)
    assert mine == plain
    assert engine._graphs._steps, "nothing went through a bucket"


@pytest.mark.parametrize("dtype", ["int8", "int4", "fp8"])
def test_weights_of_few_bits_answer_as_they_do_without_buckets(make_model, hybrid, tokenizer, dtype):
    """In the form of a GPU, on it where there is one (then recorded), beside the same weights on a CPU, unrecorded."""
    config = replace(hybrid.config, intermediate_size=64, mamba_num_heads=8)
    plain, mine = make_model(config, 3), make_model(config, 3)
    for model in (plain, mine):
        fewbits.to_fp8(model) if dtype == "fp8" else pack_model(model, int(dtype[3:]))
    fewbits.settle(mine, torch.float32)
    mine.to("cuda" if CUDA else "cpu")
    settings = [Sampling(max_tokens=n, ignore_eos=True) for n in (12, 3, 9)]
    prompts = [[70], [71] * 40, [72] * 5]
    with ops.using("torch"):
        answers = [a.ids for a in Engine(plain, tokenizer, max_sequences=3, kv_tokens=256).generate(prompts, settings)]
    engine = graphed(mine, tokenizer, max_sequences=3, kv_tokens=256)
    assert [a.ids for a in engine.generate(prompts, settings)] == answers
    assert engine._graphs._steps and len({i for ids in answers for i in ids}) > 5


def test_what_nobody_owns_is_all_that_padding_writes(hybrid, tokenizer):
    engine = graphed(hybrid, tokenizer, max_sequences=4, kv_tokens=64)
    state = engine._running().pool.state
    for side in (state.conv, state.ssm, state.k, state.v):
        for tensor in side.values():
            tensor.fill_(7.0)
    sequence = engine.add([70, 71], Sampling(max_tokens=3, ignore_eos=True))[0]
    others = [s for s in range(4) if s != 0]
    while sequence.finish is None:
        engine.step()
    assert all((side[layer][others] == 7).all() for side in (state.conv, state.ssm) for layer in side)
    mine = {0}  # the first block of the first slot holds two tokens and three more
    free = [b for b in range(state.k[next(iter(state.k))].shape[0] - 1) if b not in mine]
    assert all((side[layer][free] == 7).all() for side in (state.k, state.v) for layer in side)


def test_draws_do_not_depend_on_the_bucket(hybrid, tokenizer):
    sampling = Sampling(max_tokens=12, temperature=0.8, top_p=0.9, seed=3, ignore_eos=True, logprobs=1)
    plain = next(Engine(hybrid, tokenizer, max_sequences=3, kv_tokens=128).generate([[70, 80]], sampling))
    mine = next(graphed(hybrid, tokenizer, max_sequences=3, kv_tokens=128).generate([[70, 80]], sampling))
    assert mine.ids == plain.ids
    assert mine.logprobs == pytest.approx(plain.logprobs, abs=1e-4)


SETTINGS = [
    {},
    {"temperature": 1.3},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 7, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2},
]


def test_a_batch_of_unlike_settings_draws_what_each_draws_alone_on_the_host(hybrid, tokenizer):
    settings = [Sampling(max_tokens=12, seed=5, ignore_eos=True, **more) for more in SETTINGS]
    prompts = [[70 + i, 80] for i in range(len(settings))]
    engine = graphed(hybrid, tokenizer, max_sequences=6, kv_tokens=256)
    together = [answer.ids for answer in engine.generate(prompts, settings)]
    assert {key[2] for key in engine._graphs._steps} >= {Kinds(True, True, True)}
    alone = Engine(hybrid, tokenizer, max_sequences=1, kv_tokens=64)
    assert together == [next(alone.generate([p], s)).ids for p, s in zip(prompts, settings, strict=True)]


@pytest.fixture
def asked(monkeypatch):
    """Rows that the host was asked to draw, one number a call."""
    rows = []

    def counted(logits_SV, draws):
        rows.append(len(draws))
        return sample(logits_SV, draws)

    monkeypatch.setattr("whimbrel.engine.engine.sample", counted)
    return rows


def test_penalties_are_drawn_in_the_step_whoever_had_the_slot_before(hybrid, tokenizer, asked):
    """Unlike penalties over two slots, with blocks that run out: the record follows each sequence, never its slot."""
    penalties = [2.0, 1.0, 1.5, 0.7, 3.0, 1.2]
    settings = [Sampling(max_tokens=20 + 3 * n, temperature=[0.0, 0.9][n % 2], seed=n, ignore_eos=True,
                         repetition_penalty=penalty) for n, penalty in enumerate(penalties)]  # fmt: skip
    prompts = [[70 + n] * (1 + 9 * n) for n in range(len(settings))]
    alone = Engine(hybrid, tokenizer, max_sequences=1, kv_tokens=128)
    wanted = [next(alone.generate([p], s)).ids for p, s in zip(prompts, settings, strict=True)]
    free = [
        next(alone.generate([p], replace(s, repetition_penalty=1.0))).ids
        for p, s in zip(prompts, settings, strict=True)
    ]
    assert sum(a != b for a, b in zip(wanted, free, strict=True)) == 5
    engine = graphed(hybrid, tokenizer, max_sequences=2, kv_tokens=112)
    queued = [engine.add(p, s, i)[0] for i, (p, s) in enumerate(zip(prompts, settings, strict=True))]
    asked.clear()
    while any(sequence.finish is None for sequence in queued):
        engine.step()
    assert [sequence.answer().ids for sequence in queued] == wanted
    assert sum(sequence.preempted for sequence in queued), "nothing gave way, so no record was made twice"
    drawn = sum(len(ids) for ids in wanted)
    assert sum(asked) < drawn / 3, "the host draws beside prompts alone"


def test_rows_beyond_the_likeliest_are_ordered_in_the_step_from_the_second_time_on(
    make_model, hybrid, tokenizer, asked
):
    model = make_model(replace(hybrid.config, vocab_size=2500), 3)
    said = [Sampling(temperature=50.0, top_p=0.99), Sampling(temperature=0.7), Sampling(temperature=3.0, top_k=1500),
            Sampling(), Sampling(temperature=0.5, top_p=0.9)]  # fmt: skip
    said = [replace(s, max_tokens=12, seed=n, ignore_eos=True) for n, s in enumerate(said)]
    prompts, quiet = [[70 + n] for n in range(5)], {"report": lambda event: None}
    alone = Engine(model, tokenizer, max_sequences=1, kv_tokens=64, **quiet)
    wanted = [next(alone.generate([p], s)).ids for p, s in zip(prompts, said, strict=True)]
    engine = graphed(model, tokenizer, max_sequences=5, kv_tokens=512, **quiet)
    asked.clear()
    assert [answer.ids for answer in engine.generate(prompts, said)] == wanted
    assert asked == [5, 1], "the first step, beside the prompts, and the flat row once"
    assert {key[2].ordered for key in engine._graphs._steps} == {1, 2}


def test_weights_that_moved_are_recorded_anew(make_model, hybrid, tokenizer):
    model = make_model(hybrid.config, 5)
    engine = graphed(model, tokenizer, max_sequences=2, kv_tokens=64)
    next(engine.generate([[70]], Sampling(max_tokens=3)))
    before = dict(engine._graphs._steps)
    model.touch()
    next(engine.generate([[70]], Sampling(max_tokens=3)))
    assert engine._graphs._steps == before, "weights changed in place are read where they were"
    model.norm_f.weight = torch.nn.Parameter(model.norm_f.weight.clone())
    model.touch()
    next(engine.generate([[70]], Sampling(max_tokens=3)))
    assert all(engine._graphs._steps[key] is not step for key, step in before.items())


def test_a_float16_state_answers_nearly_as_float32_whoever_shares_the_batch(hybrid, tokenizer):
    sampling = Sampling(max_tokens=40, ignore_eos=True, logprobs=0)
    settings = {"max_sequences": 3, "kv_tokens": 256, "state_dtype": "float16"}
    engine = Engine(hybrid, tokenizer, **settings)
    state = engine.start()._running().pool.state
    assert {tensor.dtype for tensor in state.ssm.values()} == {torch.float16}
    alone = next(engine.generate([[70, 80]], sampling))
    together = list(Engine(hybrid, tokenizer, **settings).generate([[90], [70, 80], [75] * 9], sampling))
    assert together[1].ids == alone.ids, "rounding belongs to position and layer, not to the slot"
    exact = Engine(hybrid, tokenizer, max_sequences=1, kv_tokens=256).score([[70, 80]], [list(alone.ids)])[0]
    gaps = (torch.tensor(alone.logprobs) - torch.tensor(exact)).abs()
    assert 0 < gaps.max() < 0.05


def test_a_state_dtype_that_cannot_be_names_what_works(hybrid, tokenizer):
    with pytest.raises(UserError, match="state_dtype is 'bfloat16'; set state_dtype to float32 or float16"):
        Engine(hybrid, tokenizer, state_dtype="bfloat16")
