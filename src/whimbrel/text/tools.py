"""The tool-call format of Nano 2: a JSON list between tags, in both directions.

A model writes `<TOOLCALL>[{"name": …, "arguments": {…}}, …]</TOOLCALL>`; what the tools returned goes back to it as
`<TOOL_RESPONSE>[…, …]</TOOL_RESPONSE>`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

CALL_OPEN, CALL_CLOSE = "<TOOLCALL>", "</TOOLCALL>"
RESULT_OPEN, RESULT_CLOSE = "<TOOL_RESPONSE>", "</TOOL_RESPONSE>"
TOOLS_OPEN, TOOLS_CLOSE = "<AVAILABLE_TOOLS>", "</AVAILABLE_TOOLS>"


@dataclass(frozen=True)
class Call:
    """One function call; `arguments` is a JSON object."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Parsed:
    """An answer cut into its text and its calls. Where calls cannot be read, `error` says why and there are none."""

    text: str
    calls: tuple[Call, ...] = ()
    error: str | None = None


def parse(answer: str) -> Parsed:
    """Read the calls at the end of an answer (without its thought).

    Strict: one list between its tags, each entry an object of exactly `name` and `arguments`, nothing after it but
    white space. A closing tag inside a JSON string does not end the list. Without an opening tag there are no calls.
    """
    text, found, rest = answer.partition(CALL_OPEN)
    if not found:
        return Parsed(answer)
    body = rest.lstrip()
    try:
        calls, end = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode(body)
        closing = body[end:].strip()
        if not closing.startswith(CALL_CLOSE):
            raise ValueError(f"{CALL_CLOSE} does not follow the list")
        if closing != CALL_CLOSE:
            raise ValueError(f"text follows {CALL_CLOSE}")
        if not isinstance(calls, list) or not calls:
            raise ValueError("the calls are not a list of at least one")
        return Parsed(text, tuple(_call(entry, number) for number, entry in enumerate(calls, start=1)))
    except (ValueError, RecursionError) as error:
        return Parsed(text, error=f"{CALL_OPEN} cannot be read: {error}")


def _call(entry: Any, number: int) -> Call:
    if not isinstance(entry, dict) or set(entry) != {"name", "arguments"}:
        raise ValueError(f"call {number} is not an object of name and arguments")
    if not isinstance(entry["name"], str) or not entry["name"]:
        raise ValueError(f"call {number} has no name")
    if not isinstance(entry["arguments"], dict):
        raise ValueError(f"the arguments of call {number} are not an object")
    return Call(entry["name"], entry["arguments"])


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def format_calls(calls: Iterable[Mapping[str, Any]]) -> str:
    """Calls as the model writes them. Each is `{"name", "arguments"}`, or `{"function": {…}}` around it as in the
    OpenAI API; arguments that are a string already are taken for JSON and go in as they are."""
    entries = []
    for call in calls:
        function = call.get("function", call)
        arguments = function["arguments"]
        body = arguments if isinstance(arguments, str) else to_json(arguments)
        entries.append(f'{{"name": {to_json(function["name"])}, "arguments": {body}}}')
    return f"{CALL_OPEN}[{', '.join(entries)}]{CALL_CLOSE}"


def format_results(results: Sequence[str]) -> str:
    """The results of consecutive calls, each as the tool wrote it, as one list."""
    return f"{RESULT_OPEN}[{', '.join(results)}]{RESULT_CLOSE}"


def format_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """Descriptions of functions (JSON schemas, with or without the OpenAI wrapping) as one list."""
    return f"{TOOLS_OPEN}[{', '.join(to_json(tool.get('function', tool)) for tool in tools)}]{TOOLS_CLOSE}"


def to_json(value: Any) -> str:
    """JSON as transformers writes it in chat templates: one line, letters beyond ASCII kept."""
    return json.dumps(value, ensure_ascii=False)
