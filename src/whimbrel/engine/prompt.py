"""The three forms of a prompt (text, messages, ids) made one: ids, and whether a thought is open at their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from whimbrel.errors import UserError
from whimbrel.text.chat import Message
from whimbrel.text.thinking import CLOSE, OPEN, is_open
from whimbrel.text.tokenizer import Tokenizer

Prompt = str | Sequence[Message] | Sequence[int]


def read_prompt(prompt: Prompt, tokenizer: Tokenizer, thinking: bool, vocabulary: int) -> tuple[tuple[int, ...], bool]:
    """(ids, opened). Messages go through the chat template, with its thinking or its plain form; text and ids stay as
    they are. Anything else raises `UserError`.

    `opened` says that the answer starts inside a thought. What a user wrote in a message never opens one.
    """
    if not isinstance(prompt, Sequence):
        one = "one message outside of a list" if isinstance(prompt, Mapping) else repr(prompt)
        raise UserError(f"the prompt is {one}; give text, a list of messages, or a list of ids")
    if isinstance(prompt, str):
        ids, opened = tokenizer.encode(prompt, bos=tokenizer.adds_bos), _open_at_end(prompt)
    elif prompt and isinstance(prompt[0], Mapping):
        text = tokenizer.render(cast(list[Message], prompt), thinking=thinking, generation=True)
        ids, opened = tokenizer.encode(text), is_open(text)
    else:
        ids = _checked(prompt, vocabulary)
        opened = _open_at_end(tokenizer.decode(ids, skip_special=False))
    if not ids:
        raise UserError("the prompt is empty; give at least one token")
    return tuple(ids), opened


def _open_at_end(text: str) -> bool:
    return text.rfind(OPEN) > text.rfind(CLOSE)


def _checked(prompt: Sequence[Any], vocabulary: int) -> list[int]:
    """Ids as a list of whole numbers inside the vocabulary."""
    for token in prompt:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
            raise UserError(f"prompt holds {token!r}; a prompt is text, messages, or ids from 0 to {vocabulary - 1}")
    return list(prompt)
