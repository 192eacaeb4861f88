"""Text: the tokenizer, the chat format with its loss mask, thinking tags and tool calls."""

from whimbrel.text.chat import Message, Piece
from whimbrel.text.stream import TextStream
from whimbrel.text.thinking import CLOSE, OPEN, Thought, is_open, split, strip_history, well_formed
from whimbrel.text.tokenizer import Tokenizer
from whimbrel.text.tools import Call, Parsed, format_calls, format_results, parse

__all__ = [
    "CLOSE",
    "OPEN",
    "Call",
    "Message",
    "Parsed",
    "Piece",
    "TextStream",
    "Thought",
    "Tokenizer",
    "format_calls",
    "format_results",
    "is_open",
    "parse",
    "split",
    "strip_history",
    "well_formed",
]
