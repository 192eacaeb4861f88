"""The terminal chat: commands, history, Ctrl-C, and what goes where without a terminal."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from rich.console import Console

from whimbrel.engine import Engine, Sampling
from whimbrel.model import LanguageModel, ModelConfig
from whimbrel.serve.chat import Chat, _converse, chat
from whimbrel.text import Tokenizer

RING = "\nab</think>ZYX\x1b"  # what the network writes, round and round


@pytest.fixture(scope="module")
def engine():
    tokenizer = Tokenizer.train(["whimbrel"], 320)
    ids = tokenizer.encode(RING)
    model = LanguageModel(ModelConfig(pattern="-", vocab_size=320, hidden_size=320, intermediate_size=1)).initialise(0)
    with torch.no_grad():
        for parameter in model.layers[0].mixer.parameters():
            parameter.zero_()
        model.embeddings.weight.copy_(torch.eye(320))
        model.head.weight.zero_()
        for now, following in zip(ids, [*ids[1:], ids[0]], strict=True):
            model.head.weight[following, now] = 1.0
    return Engine(model, tokenizer)


@pytest.fixture
def talk(engine):
    console, notes = (Console(file=io.StringIO(), width=200) for _ in range(2))
    return Chat(engine, Sampling(max_tokens=14), console=console, notes=notes)


def text(console):
    return console.file.getvalue()


def test_answers_and_thoughts_go_apart_and_history_keeps_answers(talk):
    answer = talk.say("hi")
    assert (answer.thinking, answer.text) == ("ab", "ZYX\x1b")
    assert text(talk.console) == "ZYX␛\n", "control characters are shown, not obeyed"
    assert text(talk.notes).startswith("ab\n") and "14 tokens (2 of them thought, closed)" in text(talk.notes)
    assert "tokens/s" in text(talk.notes) and "cut off by max_tokens" in text(talk.notes)
    talk.say("again")
    assert [turn["content"] for turn in talk.turns] == ["hi", "ZYX\x1b", "again", "ZYX\x1b"]
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 2


def test_thoughts_are_dim_on_a_terminal(engine):
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system="standard")
    Chat(engine, Sampling(max_tokens=14), console=console).say("hi")
    assert "\x1b[2ma\x1b[0m\x1b[2mb\x1b[0m" in text(console) and "\x1b[2mZ" not in text(console)


def test_commands_change_what_comes_next(talk):
    talk.say("hi")
    assert talk.command("/nothink") and talk.sampling.thinking_budget == 0
    assert talk.say("x").thinking_ended == "off"
    assert talk.command("/think 7") and talk.sampling.thinking_budget == 7
    assert talk.command("/think") and talk.sampling.thinking_budget is None
    assert talk.command("/think -3") and talk.command("/think 0") and talk.sampling.thinking_budget is None
    assert text(talk.notes).count("is not a number of tokens above 0") == 2
    assert talk.command("/system be brief") and talk.system == "be brief" and talk.turns == []
    shorter = talk.say("x").prompt_tokens
    assert talk.command("/system") and talk.system is None
    assert talk.say("x").prompt_tokens < shorter, "the system message had reached the model"
    assert talk.command("/reset") and talk.turns == []
    assert talk.command("/help") and "/nothink" in text(talk.notes)
    assert talk.command("/rest") and "did you mean '/reset'?" in text(talk.notes)
    assert not talk.command("/quit")


def test_a_message_that_does_not_fit_is_explained_and_forgotten(talk, monkeypatch):
    assert talk.say("") is not None
    monkeypatch.setattr(talk.engine, "_check_length", _refuse)
    before = list(talk.turns)
    assert talk.say("too long") is None and talk.turns == before
    assert "kv_tokens" in text(talk.notes) and "/reset" in text(talk.notes)


def _refuse(*_):
    from whimbrel.errors import UserError

    raise UserError("a prompt of 9 tokens … kv_tokens to 10")


def interrupting(engine, after):
    """The engine's step, with Ctrl-C pressed during step number `after`."""
    steps, original = [0], engine.step

    def step():
        steps[0] += 1
        if steps[0] == after:
            raise KeyboardInterrupt
        return original()

    return step


def test_ctrl_c_stops_an_answer_and_pressed_again_leaves(talk, monkeypatch):
    monkeypatch.setattr(talk.engine, "step", interrupting(talk.engine, 13))
    lines = iter(["hi", KeyboardInterrupt(), "never read"])

    def read():
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    _converse(talk, read)
    assert next(lines) == "never read"
    assert "(stopped)" in text(talk.notes)
    assert talk.turns[-1] == {"role": "assistant", "content": "ZY"}, "what was written stays"
    assert not talk.engine._running().busy, "the engine has let go of it"


def test_at_the_prompt_one_ctrl_c_warns_and_words_in_between_reset_it(talk):
    lines = iter(
        [KeyboardInterrupt(), "/help", KeyboardInterrupt(), "hi", KeyboardInterrupt(), KeyboardInterrupt(), "no"]
    )

    def read():
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    _converse(talk, read)
    assert next(lines) == "no" and len(talk.turns) == 2
    assert text(talk.notes).count("Ctrl-C again") == 3


def test_once_answers_and_leaves(engine, capsys):
    assert chat(engine, Sampling(max_tokens=13), once="hi") == 0
    out, err = capsys.readouterr()
    assert out == "ZYX\n" and "ab" in err and "tokens/s" in err


def test_without_a_terminal_lines_are_read_to_the_end(engine, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\n/nothink\nhi\n/quit\nhi\n"))
    assert chat(engine, Sampling(max_tokens=13)) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("ZYX\n") and len(out.splitlines()) >= 2
