"""Chat templates that come with a model: Jinja, rendered in a sandbox under the rules transformers has for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from whimbrel.errors import UserError
from whimbrel.text import thinking as tags
from whimbrel.text.chat import Message, Piece, tidy

# Whatever a template written by someone else can stumble over when the messages are not what it expects.
_STUMBLES = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what an assistant wrote; the body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One Jinja chat template and the special tokens (`bos_token`, …) that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], ends: Sequence[str] = ()) -> None:
        """`ends` are the texts of the tokens that end a turn; white space after one is not trained."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"line {error.lineno} of the chat template is not Jinja: {error.message}; mend chat_template"
            ) from error
        self._special_tokens = dict(special_tokens)
        self._ends = tuple(ends)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        generation: bool = False,
    ) -> str:
        """The conversation as text. UserError with the template's own words if it refuses the messages."""
        messages = tidy(messages)
        try:
            return self._template.render(
                messages=messages,
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=generation,
                enable_thinking=thinking,
                **self._special_tokens,
            )
        except _STUMBLES as error:
            raise UserError(
                f"the model's chat template refuses this conversation: {error}; change the messages"
            ) from error

    def render_pieces(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        generation: bool = False,
    ) -> list[Piece]:
        """Text and mask, by rendering turn by turn; which turns are trained is said as in `whimbrel.text.chat`.

        A trained turn is what the whole text adds to the prompt that asks for it, up to the turn's end. UserError where
        the template renders a turn differently once others follow: it has no fixed place then.
        """
        whole = self.render(messages, tools=tools, thinking=thinking, generation=generation)
        pieces, done = [], 0
        for index, message in enumerate(messages):
            if generation or message["role"] != "assistant" or not message.get("train", index == len(messages) - 1):
                continue
            start = self.render(messages[:index], tools=tools, thinking=thinking, generation=True) if index else ""
            upto = self.render(messages[: index + 1], tools=tools, thinking=thinking)
            if not (whole.startswith(start) and whole.startswith(upto) and done <= len(start) < len(upto)):
                raise UserError(
                    f"the model's chat template renders message {index + 1} differently inside the conversation than "
                    'as its end, so its loss mask is unknown; let only the last message have "train": true'
                )
            end = len(self._turn(upto))
            _keeps_thought(message, whole[len(start) : end], index + 1)
            pieces += [Piece(whole[done : len(start)], False), Piece(whole[len(start) : end], True)]
            done = end
        return [*pieces, Piece(whole[done:], False)]

    def _turn(self, text: str) -> str:
        """The text without white space that follows a token ending the turn: the model stops before it."""
        bare = text.rstrip()
        return bare if bare.endswith(self._ends) else text


def _keeps_thought(message: Message, written: str, number: int) -> None:
    before, closed, _ = message.get("content", "").rpartition(tags.CLOSE)
    thought = (before if closed else message.get("reasoning_content", "")).split(tags.OPEN, 1)[-1].strip()
    if thought not in written:
        raise UserError(
            f"the model's chat template leaves out the thought of message {number}, so it cannot be trained; "
            "remove the thought from the message, or give the model a chat_template that keeps it"
        )


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Unlike Jinja's own filter, no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
