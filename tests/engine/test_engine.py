"""What a user of the engine sees: forms of prompts, text, thoughts, stops, streams, and mistakes."""

from __future__ import annotations

import warnings

import pytest
import torch

from whimbrel.engine import Engine, Sampling
from whimbrel.errors import UserError
from whimbrel.model import LanguageModel, ModelConfig
from whimbrel.text.thinking import CLOSE

USER = [{"role": "user", "content": "x"}]


def answer(engine, prompt, **settings):
    return next(engine.generate([prompt], Sampling(**settings)))


@pytest.fixture
def engine(hybrid, tokenizer):
    return Engine(hybrid, tokenizer, max_sequences=4, kv_tokens=512)


def test_text_messages_and_ids_are_one_prompt(engine, tokenizer):
    text = tokenizer.render(USER, thinking=False)
    ids = tokenizer.encode(text)
    three = [answer(engine, prompt, max_tokens=8, thinking_budget=0) for prompt in (text, USER, ids)]
    assert len({a.ids for a in three}) == 1
    assert {a.prompt_tokens for a in three} == {len(ids)}
    assert {a.thinking_ended for a in three} == {"off"} and not any(a.forced for a in three)


def test_nothing_is_allocated_before_start(hybrid, tokenizer):
    engine = Engine(hybrid, tokenizer, max_sequences=2, kv_tokens=64)
    assert engine._scheduler is None
    assert engine.start()._scheduler is engine.start()._scheduler is not None


def test_answers_come_in_the_order_of_prompts_and_prompts_are_drawn_as_needed(engine):
    drawn = []

    def prompts():
        for number in range(50):
            drawn.append(number)
            yield [70 + number]

    stream = engine.generate(prompts(), Sampling(max_tokens=2))
    assert next(stream).index == 0
    assert len(drawn) < 30, "a long iterator is not read to its end at once"
    assert [a.index for a in stream] == list(range(1, 50))


def test_leaving_early_takes_requests_back(engine):
    stream = engine.generate([[70], [71], [72]], Sampling(max_tokens=50, ignore_eos=True))
    pieces = engine.stream([73], Sampling(max_tokens=50, ignore_eos=True))
    next(pieces)
    pieces.close()
    stream.close()
    next(engine.generate([[70]], Sampling(max_tokens=1)))
    scheduler = engine._running()
    assert not scheduler.busy and scheduler.pool.free_slots == 4 and scheduler.pool.free_blocks == scheduler.pool.blocks


def test_an_aborted_request_keeps_what_it_wrote(speaker, tokenizer):
    engine = Engine(speaker("abcdefgh"), tokenizer)
    (sequence,) = engine.add("a", Sampling(max_tokens=50))
    for _ in range(3):
        engine.step()
    engine.abort(sequence)
    engine.abort(sequence)
    assert (sequence.answer().text, sequence.answer().finish) == ("bcd", "abort")
    assert not engine._running().busy


@pytest.mark.parametrize("prompt", ["abc<think>\n", [{"role": "user", "content": "hm"}]], ids=["text", "messages"])
@pytest.mark.parametrize("budget", [1, 4, 7])
def test_the_budget_counts_generated_tokens_alone(speaker, tokenizer, prompt, budget):
    """No line break comes, so the grace ends the thought; tokens of the prompt never count."""
    engine = Engine(speaker("\n0123456789>rstuv"), tokenizer)
    a = answer(engine, prompt, max_tokens=40, thinking_budget=budget, thinking_grace=2)
    spoken = "0123456789>rstuv\n" * 3
    assert a.thinking == spoken[: budget + 2]
    assert (a.thinking_ended, a.thinking_tokens) == ("grace", budget + 2)
    assert a.forced == tuple(range(budget + 2, budget + 2 + len(CLOSE)))
    assert tokenizer.decode(a.ids).count(CLOSE) == 1
    assert a.text.startswith("rstuv\n0123")


def test_the_thought_ends_at_a_line_break_and_the_answer_follows(speaker, tokenizer):
    engine = Engine(speaker("\n0123\r456>rst"), tokenizer)  # the ring's only line break comes after `t`
    a = answer(engine, USER, max_tokens=40, thinking_budget=3)
    assert (a.thinking, a.thinking_ended, a.thinking_tokens) == ("0123\r456>rst\n", "budget", 13)
    a = answer(engine, USER, max_tokens=6, thinking_budget=3)
    assert (a.thinking, a.text, a.thinking_ended, a.finish) == ("0123\r4", "", "length", "length")


def test_a_thought_that_closes_itself_within_the_budget(speaker, tokenizer):
    engine = Engine(speaker("\nab</think>ZYX"), tokenizer)
    for budget in (None, 100):
        a = answer(engine, USER, max_tokens=14, thinking_budget=budget)
        assert (a.thinking, a.text, a.thinking_ended, a.thinking_tokens, a.forced) == ("ab", "ZYX\n", "closed", 2, ())


def test_budget_zero_closes_a_thought_that_the_prompt_has_opened(speaker, tokenizer):
    engine = Engine(speaker("\nab>ZYX"), tokenizer)
    a = answer(engine, "hm<think>\n", max_tokens=11, thinking_budget=0)
    assert (a.thinking, a.text, a.thinking_ended, a.thinking_tokens) == ("", "ZYX", "off", 0)
    assert a.forced == tuple(range(8))


def test_stop_strings_are_never_shown_and_spare_the_thought(speaker, tokenizer):
    engine = Engine(speaker("\nab</think>ZYXW"), tokenizer)
    a = answer(engine, USER, max_tokens=60, stop=("YX", "b"))
    assert (a.thinking, a.text, a.finish, a.stop) == ("ab", "Z", "stop", "YX")
    a = answer(engine, USER, max_tokens=60, stop=("b",), stop_in_thinking=True)
    assert (a.thinking, a.text, a.finish, a.stop, a.thinking_ended) == ("a", "", "stop", "b", "length")
    a = answer(engine, USER, max_tokens=12, stop="YXQ")
    assert (a.text, a.finish, a.stop) == ("ZY", "length", None), "what might have become a stop is shown at the end"


def test_end_of_sequence_ends_and_is_not_shown(tokenizer, speaker):
    model = speaker("abc")
    with torch.no_grad():
        model.head.weight[:, tokenizer.encode("c")[0]] = 0
        model.head.weight[tokenizer.eos_ids[0], tokenizer.encode("c")[0]] = 1
    engine = Engine(model, tokenizer)
    a = answer(engine, "a", max_tokens=9)
    assert (a.text, a.finish) == ("bc", "stop") and a.ids[-1] == tokenizer.eos_ids[0]
    assert len(answer(engine, "a", max_tokens=9, ignore_eos=True).ids) == 9


@pytest.mark.parametrize("settings", [{}, {"thinking_budget": 3, "thinking_grace": 1}, {"stop": "st"}])
def test_a_stream_joined_is_the_answer(engine, speaker, tokenizer, settings):
    for one in (engine, Engine(speaker("\n0123>rsté€"), tokenizer)):
        chunks = list(one.stream(USER, Sampling(max_tokens=40, **settings)))
        whole = chunks[-1].answer
        assert whole is not None and all(chunk.answer is None for chunk in chunks[:-1])
        assert whole.thinking == "".join(chunk.text for chunk in chunks if chunk.kind == "thinking")
        assert whole.text == "".join(chunk.text for chunk in chunks if chunk.kind == "answer")
        assert whole.ids == tuple(token for chunk in chunks for token in chunk.ids)
        assert (whole.text, whole.ids) == (answer(one, USER, max_tokens=40, **settings).text, whole.ids)


def test_a_character_of_several_tokens_is_shown_whole(tokenizer, speaker):
    engine = Engine(speaker("aé"), tokenizer)
    assert [chunk.text for chunk in engine.stream("a", Sampling(max_tokens=5))] == ["é", "a", "é"]
    assert answer(engine, "a", max_tokens=4).text == "éa\ufffd", "a character cut off by max_tokens is said to be one"


def test_log_probabilities_are_as_many_as_ids(engine):
    a = answer(engine, [70, 71], max_tokens=5, logprobs=3, temperature=0.7, top_k=2, seed=1, ignore_eos=True)
    assert len(a.logprobs) == len(a.top_logprobs) == len(a.ids) == 5
    for token, value, top in zip(a.ids, a.logprobs, a.top_logprobs, strict=True):
        assert len(top) == 3 and dict(top)[token] == value
    a = answer(engine, [70, 71], max_tokens=5, logprobs=0, ignore_eos=True)
    assert a.top_logprobs is None and len(a.logprobs) == 5
    assert answer(engine, [70, 71], max_tokens=5).logprobs is None


def test_one_sampling_for_each_prompt(engine):
    answers = list(engine.generate([[70], [70]], [Sampling(max_tokens=n, ignore_eos=True) for n in (2, 5)]))
    assert [len(a.ids) for a in answers] == [2, 5]


def test_times_and_counts(engine):
    a = answer(engine, [70, 71, 72], max_tokens=4, ignore_eos=True)
    assert (a.prompt_tokens, len(a.ids), a.finish) == (3, 4, "length")
    assert 0 <= a.wait_seconds <= a.first_seconds <= a.seconds


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("hello", "put it in a list"),
        ([""], "empty"),
        ([[]], "empty"),
        ([[70, 320]], "prompt holds 320"),
        ([[70, "a"]], "prompt holds 'a'"),
        ([{"role": "user", "content": "x"}], "one message"),
        ([7], "the prompt is 7"),
    ],
)
def test_prompts_that_cannot_be_are_named(engine, prompts, words):
    with pytest.raises(UserError, match=words):
        list(engine.generate(prompts))


def test_sizes_and_tokenizers_that_cannot_be_are_named(hybrid, tokenizer):
    for name in ("max_sequences", "kv_tokens", "block_size", "prefill_tokens"):
        with pytest.raises(UserError, match=f"{name}=0.*set {name}"):
            Engine(hybrid, tokenizer, **{name: 0})
    small = LanguageModel(ModelConfig(pattern="-", vocab_size=300, hidden_size=8, intermediate_size=8))
    with pytest.raises(UserError, match=r"320 ids.*vocab_size=300"):
        Engine(small, tokenizer)


def test_what_never_fits_is_refused_and_what_fits_tightly_runs(hybrid, tokenizer):
    engine = Engine(hybrid, tokenizer, kv_tokens=32, block_size=16)
    with pytest.raises(UserError, match=r"kv_tokens=32; set max_tokens to at most 22"):
        answer(engine, [70] * 10, max_tokens=23)
    with pytest.raises(UserError, match=r"shorten the prompt"):
        answer(engine, [70] * 40, max_tokens=1)
    assert len(answer(engine, [70] * 10, max_tokens=22, ignore_eos=True).ids) == 22


def test_a_context_beyond_training_warns_once(hybrid, tokenizer, make_model):
    from dataclasses import replace

    model = make_model(replace(hybrid.config, max_position_embeddings=16), 0)
    heard: list[dict] = []
    engine = Engine(model, tokenizer, kv_tokens=64, report=heard.append)
    answer(engine, [70] * 10, max_tokens=6)
    assert not heard
    answer(engine, [70] * 10, max_tokens=7)
    answer(engine, [70] * 10, max_tokens=8)
    assert len(heard) == 1 and "max_position_embeddings=16" in heard[0]["text"]
    with pytest.warns(UserWarning, match="max_position_embeddings=16"):
        answer(Engine(model, tokenizer, kv_tokens=64), [70] * 10, max_tokens=7)


def test_the_default_memory_is_the_contexts_or_what_is_free(hybrid, tokenizer):
    engine = Engine(hybrid, tokenizer, max_sequences=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer(engine, [70], max_tokens=2)
    pool = engine._running().pool
    assert 0 < pool.blocks * pool.block_size <= 2 * hybrid.config.max_position_embeddings


def test_tags_that_are_special_tokens_are_found_too(speaker, tokenizer, tmp_path):
    """Some vocabularies mark the tags as special; hidden by an ordinary decode, they must still end the thought."""
    import json

    from whimbrel.text import Tokenizer

    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    text = file.read_text().replace("<SPECIAL_20>", "<think>").replace("<SPECIAL_21>", CLOSE)
    assert json.loads(text)
    file.write_text(text)
    special = Tokenizer.load(tmp_path)
    assert special.encode(CLOSE) == [21]
    model = speaker("\nabcdefgh")
    with torch.no_grad():
        model.head.weight[special.encode("x")[0], 21] = 1  # after the tag an x
        model.head.weight[special.encode("y")[0], special.encode("x")[0]] = 1
    a = answer(Engine(model, special), USER, max_tokens=6, thinking_budget=2, thinking_grace=1)
    assert (a.thinking, a.text, a.thinking_ended, a.forced) == ("abc", "xy", "grace", (3,))


def test_bfloat16_on_a_cpu_is_refused(hybrid, tokenizer):
    with pytest.raises(UserError, match="set dtype to float32"):
        Engine(LanguageModel(hybrid.config, dtype=torch.bfloat16), tokenizer)
