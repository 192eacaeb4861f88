"""The Nano 2 chat format: rendered fact by fact, the same in transformers, with a mask of what is trained."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import UserError
from whimbrel.text import Tokenizer
from whimbrel.text.chat import render_pieces

HEAD = "<SPECIAL_10>System\n\n"
words = st.lists(
    st.sampled_from(
        [
            "hello",
            " ",
            "\n",
            "/think",
            "/no_think",
            "/no_",
            "think",
            "<think>",
            "</think>",
            "鸟🐦",
            "'\"{{}}<&",
            "</s>",
            "\t",
        ]
    )
    | st.text(max_size=4),
    max_size=8,
).map("".join)
arguments = st.dictionaries(words, st.integers() | words | st.none(), max_size=2)
functions = st.fixed_dictionaries({"name": words, "arguments": arguments | st.just('{"x": 1}')})
tool_calls = st.lists(functions | functions.map(lambda call: {"type": "function", "function": call}), max_size=2)
tool = st.fixed_dictionaries({"name": words, "description": words, "parameters": arguments})
tools = st.none() | st.lists(tool | tool.map(lambda inner: {"type": "function", "function": inner}), max_size=2)
turns = st.one_of(
    st.fixed_dictionaries({"role": st.just("user"), "content": words}),
    st.fixed_dictionaries({"role": st.just("tool"), "content": words}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": words | st.none()},
        optional={"reasoning_content": words, "reasoning": words, "tool_calls": tool_calls, "train": st.booleans()},
    ),
)
systems = st.lists(st.fixed_dictionaries({"role": st.just("system"), "content": words}), max_size=1)
conversations = st.tuples(systems, st.lists(turns, max_size=6)).map(lambda parts: parts[0] + parts[1]).filter(bool)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def test_a_prompt(tokenizer: Tokenizer) -> None:
    assert tokenizer.render([user("Hi")]) == HEAD + "<SPECIAL_11>User\nHi\n<SPECIAL_11>Assistant\n<think>\n"
    messages = [{"role": "system", "content": "Be brief."}, user("Hi")]
    expected = "<SPECIAL_10>System\nBe brief.\n<SPECIAL_11>User\nHi\n<SPECIAL_11>Assistant\n<think></think>"
    assert tokenizer.render(messages, thinking=False) == expected


@pytest.mark.parametrize(
    ("texts", "thinking", "on"),
    [
        (["", "Hi"], True, True),
        (["/no_think", "Hi"], True, False),
        (["/no_think", "Hi /think"], True, True),
        (["/think", "Hi /no_think"], True, False),
        (["", "/think /no_think"], True, False),
        (["", "/no_think /think"], True, True),
        (["", "/think"], False, False),
    ],
)
def test_the_last_switch_wins_and_no_switch_stays(
    tokenizer: Tokenizer, texts: list[str], thinking: bool, on: bool
) -> None:
    messages = [{"role": "system", "content": texts[0]}, assistant("/no_think"), user(texts[1])]
    text = tokenizer.render(messages, thinking=thinking)
    assert text.endswith("Assistant\n<think>\n" if on else "Assistant\n<think></think>")
    outside = text.replace("Assistant\n/no_think", "").replace("<think></think>", "")
    assert "/think" not in outside and "/no_think" not in outside


def test_text_around_a_switch(tokenizer: Tokenizer) -> None:
    assert "User\nWhat is 2+2?\n<" in tokenizer.render([user("What is 2+2? /no_think")])
    assert "User\n  indented \n<" in tokenizer.render([user("  indented ")])


def test_tools_and_results(tokenizer: Tokenizer) -> None:
    schema = {"name": "add", "parameters": {"type": "object"}}
    messages = [
        {"role": "system", "content": "Use tools."},
        user("2+2 and 3+3?"),
        assistant("", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}]),
        {"role": "tool", "content": "4"},
        {"role": "tool", "content": '{"sum": 6}'},
    ]
    text = tokenizer.render(messages, tools=[{"type": "function", "function": schema}])
    listed = '<AVAILABLE_TOOLS>[{"name": "add", "parameters": {"type": "object"}}]</AVAILABLE_TOOLS>\n\n'
    assert text.startswith("<SPECIAL_10>System\nUse tools.\n\n") and listed in text
    head, _, rest = text.partition("\n\n\n<SPECIAL_11>User\n")
    assert head.count("<TOOLCALL>[") == head.count("<TOOL_RESPONSE>[") == 1
    assert rest == (
        "2+2 and 3+3?\n"
        '<SPECIAL_11>Assistant\n<TOOLCALL>[{"name": "add", "arguments": {"a": 2, "b": 2}}]</TOOLCALL>\n<SPECIAL_12>\n'
        '<SPECIAL_11>User\n<TOOL_RESPONSE>[4, {"sum": 6}]</TOOL_RESPONSE>\n<SPECIAL_11>Assistant\n<think>\n'
    )


@pytest.mark.parametrize(
    "message",
    [
        assistant("<think>\n12 + 30\n</think>\n\n42"),
        assistant("12 + 30</think>42\n"),
        assistant("42", reasoning_content="12 + 30\n"),
        assistant("42", reasoning="12 + 30"),
    ],
)
def test_what_is_trained(tokenizer: Tokenizer, message: dict[str, Any]) -> None:
    pieces = render_pieces([user("12+30?"), message])
    assert [piece.text for piece in pieces if piece.trained] == ["12 + 30\n</think>\n\n42\n<SPECIAL_12>"]
    assert "".join(piece.text for piece in pieces).endswith(
        "Assistant\n<think>\n12 + 30\n</think>\n\n42\n<SPECIAL_12>\n"
    )
    ids, mask = tokenizer.encode_chat([user("12+30?"), message])
    prompt = tokenizer.encode_chat([user("12+30?")], generation=True)[0]
    assert ids[: len(prompt)] == prompt and mask.index(True) == len(prompt), "the forced prefix is not trained"
    assert ids[mask.index(True) + sum(mask) - 1] == 12 and not mask[-1]


def test_without_a_thought_the_form_is_that_of_thinking_off() -> None:
    thoughtful = assistant("42", reasoning_content="12 + 30")
    for pieces in (
        render_pieces([user("12+30?"), assistant("42")]),
        render_pieces([user("12+30?"), thoughtful], thinking=False),
        render_pieces([user("12+30? /no_think"), thoughtful]),
    ):
        assert [piece.text for piece in pieces if piece.trained] == ["42\n<SPECIAL_12>"]
        assert "".join(piece.text for piece in pieces).endswith("Assistant\n<think></think>42\n<SPECIAL_12>\n")


def test_history_loses_its_thoughts_unless_it_is_trained(tokenizer: Tokenizer) -> None:
    first, last = assistant("<think>\na</think>b</think>\n\nc"), assistant("e", reasoning_content="d")
    text = tokenizer.render([user("1"), first, user("2"), last], generation=False)
    assert "Assistant\nc\n<SPECIAL_12>\n" in text and "Assistant\n<think>\nd\n</think>\n\ne\n<SPECIAL_12>\n" in text
    pieces = render_pieces([user("1"), first | {"train": True}, user("2"), last | {"train": False}])
    assert [piece.text for piece in pieces if piece.trained] == ["a</think>b\n</think>\n\nc\n<SPECIAL_12>"]
    assert not any(piece.trained for piece in render_pieces([user("1"), first | {"train": True}], generation=True))


@given(messages=conversations, tools=tools, thinking=st.booleans(), generation=st.booleans())
def test_transformers_renders_the_same(
    tokenizer: Tokenizer, theirs: Any, messages: list[Any], tools: Any, thinking: bool, generation: bool
) -> None:
    ours = tokenizer.render(messages, tools=tools, thinking=thinking, generation=generation)
    text = theirs.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=generation, enable_thinking=thinking
    )
    assert ours == text
    if generation:
        ids, mask = tokenizer.encode_chat(messages, tools=tools, thinking=thinking, generation=True)
        same = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking)
        assert ids == same["input_ids"] == tokenizer.encode(ours)
        assert not any(mask)


@given(messages=conversations, tools=tools, thinking=st.booleans())
def test_the_mask_covers_the_trained_text_exactly(
    tokenizer: Tokenizer, messages: list[Any], tools: Any, thinking: bool
) -> None:
    pieces = render_pieces(messages, tools=tools, thinking=thinking)
    ids, mask = tokenizer.encode_chat(messages, tools=tools, thinking=thinking)
    assert tokenizer.decode(ids, skip_special=False) == "".join(piece.text for piece in pieces)
    stretches: list[list[int]] = []
    for i, (token, trained) in enumerate(zip(ids, mask, strict=True)):
        if trained and (i == 0 or not mask[i - 1]):
            stretches.append([])
        if trained:
            stretches[-1].append(token)
    found = [tokenizer.decode(stretch, skip_special=False) for stretch in stretches]
    assert found == [piece.text for piece in pieces if piece.trained]


def test_no_token_spans_the_prompt_and_the_trained_text(pages: list[str]) -> None:
    """Here a closing tag merges with the word behind it: encoded as one text, the mask would be wrong."""
    tokenizer = Tokenizer.train([*pages, "</think>word" * 9], 540)
    messages = [user("1"), assistant("word")]
    whole = tokenizer.encode(tokenizer.render(messages, generation=False))
    ids, mask = tokenizer.encode_chat(messages)
    assert ids != whole, "the two would merge here; if not, this test shows nothing"
    assert (
        tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on], skip_special=False) == "word\n<SPECIAL_12>"
    )


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        ("Hi", "list of at least one message"),
        ([{"content": "Hi"}], "message 1 has no role"),
        ([user("Hi"), {"role": "robot", "content": ""}], "message 2 has role 'robot'; set it to one of system, user"),
        ([user("Hi"), {"role": "system", "content": ""}], "message 2 is a system message"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 has a content of type list; give it as text"),
        ([assistant("", tool_calls=[{"name": "f"}])], "without name and arguments"),
    ],
)
def test_conversations_that_are_refused(tokenizer: Tokenizer, messages: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        tokenizer.render(messages)
    with pytest.raises(UserError, match=words):
        tokenizer.encode_chat(messages)
