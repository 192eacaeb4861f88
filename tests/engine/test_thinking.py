"""The budget, token by token. Here a token is a piece of text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.engine.thinking import Thinking
from whimbrel.text.thinking import CLOSE, OPEN


def encode(text):
    return [ord(character) for character in text]


def run(pieces, *, opened=True, budget=None, grace=500):
    """Feed pieces, but first the ids the machine asks for. Returns machine, thought, answer, all that was written."""
    machine = Thinking(opened=opened, budget=budget, grace=grace, encode=encode)
    shown = {"thinking": "", "answer": ""}
    written, pieces = [], list(pieces)
    while pieces or machine.forced:
        piece = chr(machine.forced.pop(0)) if machine.forced else pieces.pop(0)
        written.append(piece)
        for kind, text in machine.push(piece):
            shown[kind] += text
    for kind, text in machine.flush():
        shown[kind] += text
    return machine, shown["thinking"], shown["answer"], written


@given(st.data(), st.booleans())
def test_any_cut_gives_the_same_thought_and_answer(data, opened):
    text = ("" if opened else " \n" + OPEN) + "\na < b </b>\n" + CLOSE + "\n\nyes </think> no"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    machine, thought, answer, _ = run(pieces, opened=opened)
    assert (thought, answer, machine.ended) == ("a < b </b>\n", "yes </think> no", "closed")


def test_without_a_thought_all_is_answer_and_a_later_tag_is_text():
    machine, thought, answer, _ = run(["  see <", "think> it"], opened=False, budget=1)
    assert (thought, answer, machine.ended, machine.tokens) == ("", "  see <think> it", "off", 0)
    machine, thought, answer, _ = run([" <", "thi"], opened=False)
    assert (thought, answer, machine.ended) == ("", " <thi", "off")


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_the_thought_ends_at_the_next_line_break_after_the_budget(budget):
    pieces = ["a"] * budget + ["b", "c\n", "d", "e\n"]
    machine, thought, answer, written = run([*pieces, "rest"], budget=budget)
    assert thought == "a" * budget + "bc\n"
    assert machine.ended == "budget" and machine.tokens == budget + 2
    assert written[budget + 2 : budget + 2 + len(CLOSE)] == list(CLOSE), "the tag follows the line break at once"
    assert answer == "de\nrest"


def test_a_line_break_before_the_budget_closes_nothing_and_one_on_it_does():
    machine, thought, _, _ = run(["a\n", "b\n", "c\n", "d"], budget=3)
    assert (thought, machine.ended, machine.tokens) == ("a\nb\nc\n", "budget", 3)


@pytest.mark.parametrize("grace", [1, 3])
def test_without_a_line_break_the_grace_is_the_end(grace):
    machine, thought, answer, _ = run("abcdefghij", budget=2, grace=grace)
    assert thought == "abcdefghij"[: 2 + grace] and answer == "abcdefghij"[2 + grace :]
    assert (machine.ended, machine.tokens) == ("grace", 2 + grace)


def test_no_grace_is_a_hard_cut():
    machine, thought, answer, _ = run("abcdef", budget=2, grace=0)
    assert (thought, answer, machine.ended, machine.tokens) == ("ab", "cdef", "budget", 2)


def test_a_budget_larger_than_the_thought_changes_nothing():
    pieces = [*"thought\n", *CLOSE, *"answer"]
    machine, thought, answer, written = run(pieces, budget=100)
    assert (thought, answer, machine.ended, machine.tokens) == ("thought\n", "answer", "closed", 8)
    assert written == pieces


def test_zero_closes_at_once_and_says_off():
    machine, thought, answer, written = run("abc", budget=0)
    assert "".join(written) == CLOSE + "abc" and (thought, answer, machine.ended) == ("", "abc", "off")
    machine, thought, answer, written = run([OPEN, *"abc"], opened=False, budget=0)
    assert "".join(written) == OPEN + CLOSE + "abc" and (thought, answer, machine.ended) == ("", "abc", "off")
    machine, thought, answer, written = run([OPEN + CLOSE, "abc"], opened=False, budget=0)
    assert "".join(written) == OPEN + CLOSE + "abc", "a thought that the model closed itself is not closed again"


def test_the_opening_tag_is_not_counted():
    machine, thought, _, _ = run([*OPEN, *"ab", "c\n", "d"], opened=False, budget=3)
    assert (thought, machine.ended, machine.tokens) == ("abc\n", "budget", 3)


def test_a_tag_that_the_model_has_begun_is_completed_not_repeated():
    _, thought, answer, written = run(["a", "b</", "x"], budget=2, grace=0)
    assert "".join(written) == "ab" + CLOSE + "x" and (thought, answer) == ("ab", "x")


def test_an_answer_that_ends_inside_its_thought():
    machine, thought, answer, _ = run(["abc", "d</th"])
    assert (thought, answer, machine.ended, machine.active) == ("abcd</th", "", "length", True)
