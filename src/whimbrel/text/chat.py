"""The chat format of Nemotron Nano 2: one renderer that yields the text and says which part of it is trained.

After the published facts about the Nano 2 chat template (`docs/text.md` lists them); the sentences around the tools are
our own, because NVIDIA's wording is not known to us. `TEMPLATE` is the same rendering in Jinja, for other programs.

A conversation is a list of messages `{"role", "content"}`. An assistant's message may carry its thought as
`reasoning_content` (or `reasoning`, `thinking`) or inside its content up to `</think>`, and `tool_calls`.

Which turns are trained: an assistant's message is rendered *as it was generated* (forced prefix, thought, answer, end
of turn) if it says `"train": true`, or says nothing and is the last message; with a generation prompt, none is. Every
other assistant message is history and loses its thought, which is what the model will see when it is used. The forced
prefix is never trained; thought, answer, calls and `<SPECIAL_12>` are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from whimbrel.errors import UserError
from whimbrel.text import thinking as tags
from whimbrel.text import tools as calling

Message = Mapping[str, Any]

SYSTEM, TURN, END = "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"
ON, OFF = "/think", "/no_think"
TEMPLATE = Path(__file__).with_name("nano2.jinja").read_text(encoding="utf-8")

ROLES = ("system", "user", "assistant", "tool")
ANNOUNCE = "These functions are available to you:"
HOW_TO_CALL = (
    f"To call functions, write a list of calls in this form: "
    f'{calling.CALL_OPEN}[{{"name": "function name", "arguments": {{"parameter": "value"}}}}, ...]{calling.CALL_CLOSE}'
)
HOW_IT_RETURNS = (
    f"What the functions return will be given to you as a list in the order of the calls: "
    f"{calling.RESULT_OPEN}[result, ...]{calling.RESULT_CLOSE}"
)


class Piece(NamedTuple):
    """A stretch of a rendered conversation, and whether the model is trained to write it."""

    text: str
    trained: bool


def tidy(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Check the shape of a conversation; drop keys that are None and put a thought under `reasoning_content`."""
    if isinstance(messages, (str, Mapping)) or not messages:
        raise UserError(
            'a conversation is a list of at least one message, such as [{"role": "user", "content": "Hello"}]'
        )
    result = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f'message {number} has no role; write it as {{"role": "user", "content": "…"}}')
        clean = {key: value for key, value in message.items() if value is not None}
        thoughts = [clean[key] for key in ("reasoning_content", "thinking", "reasoning") if key in clean]
        result.append(clean | {"reasoning_content": thoughts[0]} if thoughts else clean)
    return result


def thinks(messages: Sequence[Message], thinking: bool = True) -> bool:
    """Whether the model is to think: `thinking=False` settles it, else the last switch in a system or user message.

    The switches are found anywhere, also inside a longer word, as in the published template.
    """
    on = True
    for message in messages:
        if message["role"] in ("system", "user"):
            text = message.get("content") or ""
            if OFF in text.split(ON)[-1]:
                on = False
            elif ON in text:
                on = True
    return on and thinking


def render_pieces(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    generation: bool = False,
) -> list[Piece]:
    """The conversation in the Nano 2 format; joined, the texts are what `TEMPLATE` renders.

    With `generation` it ends in the prompt for the next answer. UserError for a role, a content or a place of a
    message that the format does not know.
    """
    messages = tidy(messages)
    _check(messages)
    on = thinks(messages, thinking)
    system = _bare(messages[0]) if messages[0]["role"] == "system" else ""
    pieces = [Piece(f"{SYSTEM}System\n{system}{_tools_text(tools, bool(system))}\n", False)]
    for index, message in enumerate(messages):
        if message["role"] == "user":
            pieces.append(Piece(f"{TURN}User\n{_bare(message)}\n", False))
        elif message["role"] == "tool" and (index == 0 or messages[index - 1]["role"] != "tool"):
            pieces.append(Piece(f"{TURN}User\n{calling.format_results(_results(messages[index:]))}\n", False))
        elif message["role"] == "assistant":
            as_generated = message.get("train", index == len(messages) - 1) and not generation
            pieces += _generated(message, on) if as_generated else [Piece(_opening() + _answer(message) + "\n", False)]
    if generation:
        pieces.append(Piece(_opening(on), False))
    return pieces


def force_close(pieces: Sequence[Piece]) -> list[Piece]:
    """The same text with the closing tag of each trained thought as an untrained piece of its own.

    So a thought looks that somebody else has closed, as the engine does when a budget is spent.
    """
    result = []
    for piece in pieces:
        before, tag, after = piece.text.partition(tags.CLOSE) if piece.trained else (piece.text, "", "")
        result.append(Piece(before, piece.trained))
        result += [Piece(tag, False), Piece(after, True)] if tag else []
    return result


def _check(messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages, start=1):
        if message["role"] not in ROLES:
            raise UserError(f"message {number} has role {message['role']!r}; set it to one of {', '.join(ROLES)}")
        if message["role"] == "system" and number > 1:
            raise UserError(f"message {number} is a system message; only the first one can be: join them into one")
        for key in ("content", "reasoning_content"):
            if not isinstance(message.get(key, ""), str):
                raise UserError(f"message {number} has a {key} of type {type(message[key]).__name__}; give it as text")
        for call in message.get("tool_calls", ()):
            if not {"name", "arguments"} <= set(call.get("function", call)):
                raise UserError(f"message {number} has a tool call without name and arguments: {call}; give it both")


def _bare(message: Message) -> str:
    """The text of a system or user message without its switches, and without the white space a switch leaves behind."""
    text: str = message.get("content", "")
    if ON in text or OFF in text:
        return text.replace(OFF, "").replace(ON, "").strip()
    return text


def _tools_text(tools: Sequence[Mapping[str, Any]] | None, after_text: bool) -> str:
    if not tools:
        return ""
    lead = "\n\n" if after_text else ""
    return f"{lead}{ANNOUNCE}\n{calling.format_tools(tools)}\n\n{HOW_TO_CALL}\n\n{HOW_IT_RETURNS}\n\n"


def _results(messages: Sequence[Message]) -> list[str]:
    """The contents of the tool messages that `messages` starts with."""
    results = []
    for message in messages:
        if message["role"] != "tool":
            break
        results.append(message.get("content", ""))
    return results


def _opening(on: bool | None = None) -> str:
    """The head of an assistant's turn: of a past one, or with the prefix that forces thinking on or off."""
    forced = "" if on is None else f"{tags.OPEN}\n" if on else tags.OPEN + tags.CLOSE
    return f"{TURN}Assistant\n{forced}"


def _answer(message: Message) -> str:
    """Answer, calls and end of turn."""
    calls = message.get("tool_calls")
    return f"{tags.strip_history(message.get('content', ''))}{calling.format_calls(calls) if calls else ''}\n{END}"


def _generated(message: Message, on: bool) -> list[Piece]:
    """A turn as the model writes it. Without a thought, or with thinking off, it takes the form of thinking off."""
    before, closed, _ = message.get("content", "").rpartition(tags.CLOSE)
    thought = (before if closed else message.get("reasoning_content", "")).split(tags.OPEN, 1)[-1].strip()
    written = _answer(message)
    if on and thought:
        written = f"{thought}\n{tags.CLOSE}\n\n{written}"
    return [Piece(_opening(bool(on and thought)), False), Piece(written, True), Piece("\n", False)]
