"""Ids in, text out, one token at a time, and never half a character."""

from __future__ import annotations

import re
from collections.abc import Callable

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextStream:
    """An incremental detokeniser. All that `push` and `finish` return, joined, equals `decode` of all ids.

    Text whose last character may still change is held back: one that ends in U+FFFD (bytes of a character not yet
    complete), and a run of byte-fallback pieces, which sentencepiece-like decoders judge as a whole.
    """

    def __init__(self, decode: Callable[[list[int]], str], piece: Callable[[int], str | None]) -> None:
        """`piece` gives the vocabulary entry of an id, None for an id that adds no text (unknown, or skipped)."""
        self._decode = decode
        self._piece = piece
        self._context: list[int] = []  # the ids of the last text given out: some decoders strip a leading space
        self._held: list[int] = []
        self._before = 0
        """Characters of the context."""

    def push(self, token: int) -> str:
        """The text that this id completes, possibly none."""
        piece = self._piece(token)
        if piece is None:
            return ""
        self._held.append(token)
        whole = (
            "" if piece.startswith("<0x") and _BYTE_PIECE.fullmatch(piece) else self._decode(self._context + self._held)
        )
        return "" if not whole or whole.endswith("\ufffd") else self._release(whole)

    def finish(self) -> str:
        """What is still held, with U+FFFD for bytes that never became a character. The stream starts afresh."""
        rest = self._release(self._decode(self._context + self._held))
        self._context, self._held, self._before = [], [], 0
        return rest

    def _release(self, whole: str) -> str:
        text = whole[self._before :]
        if text:
            self._context, self._held = self._held, []
            self._before = len(self._decode(self._context))
        return text
