"""Where a thought ends, whatever the response looks like."""

from __future__ import annotations

import pytest

from whimbrel.text import Thought, is_open, split, strip_history, well_formed


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>\n12 + 30\n</think>\n\n42", False, Thought("12 + 30", "42", True, 1)),
        ("12 + 30\n</think>\n\n42", True, Thought("12 + 30", "42", True, 1)),
        ("12 + 30\n</think>\n\n42", False, Thought("12 + 30", "42", True, 1)),
        ("<think></think>42", False, Thought("", "42", True, 1)),
        ("42", False, Thought("", "42", False, 0)),
        ("12 + 3", True, Thought("12 + 3", "", False, 0)),
        ("<think>\n12 + 3", False, Thought("12 + 3", "", False, 0)),
        ("a</think>b</think>c", True, Thought("a", "b</think>c", True, 2)),
        ("\n\n    indented = 1\n", False, Thought("", "    indented = 1", False, 0)),
        ("x</think>\n\n    indented = 1\n", True, Thought("x", "    indented = 1", True, 1)),
        ("what <think> means", False, Thought("", "what <think> means", False, 0)),
        ("", True, Thought("", "", False, 0)),
    ],
)
def test_split(text: str, inside: bool, expected: Thought) -> None:
    assert split(text, inside=inside) == expected


def test_well_formed_is_exactly_one_closing_tag() -> None:
    assert [well_formed(text) for text in ("a", "a</think>b", "a</think>b</think>c", "<think>a")] == [
        False,
        True,
        False,
        False,
    ]


def test_history_keeps_what_follows_the_last_closing_tag() -> None:
    assert strip_history("<think>a</think>b</think>\n\n  c\n") == "  c"
    assert strip_history("plain") == "plain"


def test_an_open_prompt() -> None:
    assert is_open("<SPECIAL_11>Assistant\n<think>\n")
    assert not is_open("<SPECIAL_11>Assistant\n<think></think>")
    assert not is_open("<think> is a tag")
