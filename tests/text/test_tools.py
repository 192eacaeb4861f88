"""Tool calls: what is written is read back, and what cannot be read says why."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.text import Call, Parsed, format_calls, format_results, parse

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
calls = st.builds(Call, st.text(min_size=1, max_size=8), st.dictionaries(st.text(max_size=5), json_values, max_size=3))


@given(
    text=st.text(max_size=20).filter(lambda text: "<TOOLCALL>" not in text),
    made=st.lists(calls, min_size=1, max_size=3),
)
def test_calls_come_back(text: str, made: list[Call]) -> None:
    plain = [{"name": call.name, "arguments": call.arguments} for call in made]
    wrapped = [{"type": "function", "id": "1", "function": entry} for entry in plain]
    assert format_calls(plain) == format_calls(wrapped)
    assert parse(text + format_calls(plain) + "\n") == Parsed(text, tuple(made), None)


def test_a_closing_tag_inside_a_string_is_text() -> None:
    made: dict[str, Any] = {"name": "say", "arguments": {"text": "</TOOLCALL> and <TOOLCALL>"}}
    assert parse(format_calls([made])).calls == (Call("say", {"text": "</TOOLCALL> and <TOOLCALL>"}),)


def test_arguments_given_as_text_are_taken_for_json() -> None:
    assert (
        format_calls([{"name": "f", "arguments": '{"x":1}'}])
        == '<TOOLCALL>[{"name": "f", "arguments": {"x":1}}]</TOOLCALL>'
    )


def test_results() -> None:
    assert format_results(['{"sum": 42}', "naïve"]) == '<TOOL_RESPONSE>[{"sum": 42}, naïve]</TOOL_RESPONSE>'


def test_an_answer_without_calls() -> None:
    assert parse("just words </TOOLCALL>") == Parsed("just words </TOOLCALL>", (), None)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('[{"name": "f", "arguments": {}}]', "does not follow"),
        ('[{"name": "f", "arguments": {}}', "delimiter"),
        ('[{"name": "f", "arguments": {}}]</TOOLCALL> and more', "text follows"),
        ('[{"name": "f", "arguments": {}}]</TOOLCALL><TOOLCALL>[]</TOOLCALL>', "text follows"),
        ("[]</TOOLCALL>", "not a list of at least one"),
        ('{"name": "f", "arguments": {}}</TOOLCALL>', "not a list"),
        ('[{"name": "f"}]</TOOLCALL>', "call 1 is not an object of name and arguments"),
        ('[{"name": "f", "arguments": {}}, 3]</TOOLCALL>', "call 2 is not an object"),
        ('[{"name": "f", "arguments": {}, "id": 1}]</TOOLCALL>', "call 1 is not"),
        ('[{"name": "", "arguments": {}}]</TOOLCALL>', "call 1 has no name"),
        ('[{"name": "f", "arguments": "{}"}]</TOOLCALL>', "arguments of call 1 are not an object"),
        ('[{"name": "f", "arguments": {"x": NaN}}]</TOOLCALL>', "NaN is not JSON"),
        ("[" * 100_000, "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_what_cannot_be_read_says_why(body: str, words: str) -> None:
    found = parse("words " + "<TOOLCALL>" + body)
    assert (found.text, found.calls) == ("words ", ())
    assert found.error is not None and words in found.error
