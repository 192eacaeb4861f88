"""Thinking tags in plain text: where a thought ends and the answer starts.

Everything here works on text. `</think>` may be one id of a vocabulary or several, and nothing assumes which.
"""

from __future__ import annotations

from dataclasses import dataclass

OPEN = "<think>"
CLOSE = "</think>"


@dataclass(frozen=True)
class Thought:
    """A response cut into what was thought and what was answered, both without the line breaks around the tags."""

    thinking: str
    answer: str
    closed: bool
    """A closing tag ended the thought."""
    tags: int
    """Closing tags in the whole response; more than one means that the model went on thinking in its answer."""


def split(text: str, *, inside: bool = False) -> Thought:
    """Cut a response at its first closing tag, where a streaming reader cuts it too.

    `inside` says that the prompt already held the opening tag: text without a closing tag is then all thought, and
    without it, text with neither tag is all answer.
    """
    tags = text.count(CLOSE)
    before, _, after = text.partition(CLOSE)
    opened = before.lstrip().startswith(OPEN)
    thinking = before.partition(OPEN)[2] if opened else before
    if not (tags or inside or opened):
        thinking, after = "", text
    return Thought(thinking.strip(), after.strip("\n"), tags > 0, tags)


def well_formed(text: str) -> bool:
    """Exactly one closing tag: what the Nano 2 report counts as well-formed (its section 3.4)."""
    return text.count(CLOSE) == 1


def strip_history(text: str) -> str:
    """An assistant's text as later turns see it: everything up to and with the last closing tag is gone."""
    return text.rpartition(CLOSE)[2].strip("\n")


def is_open(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thought, so that the model's first token already belongs to it."""
    return prompt.rstrip().endswith(OPEN)
