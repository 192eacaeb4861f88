"""The thought of one answer: where it begins and ends, how long it may grow, and who closed it.

Tags are found in the text, never by ids, because a tag may be one id or many and may be split anywhere. When the
budget is spent the thought goes on to the next line break, at most `grace` tokens, then the closing tag is written id
by id (Nemotron Nano 2, arXiv 2508.14444, §3.4). Only the beginning of an answer can open a thought, and only the first
thought counts: a tag later on is part of the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from whimbrel.engine.stop import overlap
from whimbrel.text.thinking import CLOSE, OPEN

Kind = Literal["thinking", "answer"]
Ended = Literal["closed", "budget", "grace", "length", "off"]


class Thinking:
    """A small machine that is fed each token's text and says which part is thought, which is answer, and what must
    come next.

    `opened`: the prompt ends inside a thought. `budget`: tokens allowed inside, None for no limit, 0 to close at once.
    `encode`: ids of a text. `tokens` counts what was generated inside the thought: never a token of the prompt, never
    the tags.
    """

    def __init__(self, *, opened: bool, budget: int | None, grace: int, encode: Callable[[str], list[int]]) -> None:
        self.budget, self.grace, self.encode = budget, grace, encode
        self.tokens = 0
        self.forced: list[int] = []
        """Ids that must be written next, first one first."""
        self._ended: Ended | None = None
        self._state: Literal["before", "open", "after"] = "before"
        self._held = ""
        self._inside = 0
        self._lead = True
        if opened:
            self._state = "open"
            self._limit("")

    @property
    def active(self) -> bool:
        """Is the answer inside a thought now?"""
        return self._state == "open"

    @property
    def over(self) -> bool:
        """Is all text from now on part of the answer, as it comes?"""
        return self._state == "after" and not self._lead

    @property
    def ended(self) -> Ended:
        """How the thought ended; `off` if there was none, `length` if the answer ended before its thought did."""
        return self._ended or ("length" if self.active else "off")

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """Take the text of one generated token; return what may be shown of it, thought before answer."""
        inside = self.active
        pieces = self._split(text)
        if self.active and self._ended is None:
            self._inside += inside
            self.tokens = self.tokens if self._held else self._inside
            self._limit(text)
        return pieces

    def flush(self) -> list[tuple[Kind, str]]:
        """What was held back, once the answer is at its end."""
        held, self._held = self._held, ""
        written = self.active and self._ended is not None  # the closing tag itself was cut off by max_tokens
        return [("thinking" if self.active else "answer", held)] if held and not written else []

    def _limit(self, text: str) -> None:
        """Close the thought if its budget is spent and this token ends a line, or the grace is spent too."""
        over = self._inside - self.budget if self.budget is not None else -1
        if self.budget == 0:
            self._force("off")
        elif over >= 0 and "\n" in text:
            self._force("budget")
        elif over >= 0 and over >= self.grace:
            self._force("grace" if self.grace else "budget")

    def _force(self, ended: Ended) -> None:
        """Write the closing tag, or the rest of it where the model has begun one itself."""
        self._ended = ended
        self.forced = self.encode(CLOSE[len(self._held) :])

    def _split(self, text: str) -> list[tuple[Kind, str]]:
        """Cut the text at the tags, which are dropped; hold back an end that may still become a tag."""
        text, self._held = self._held + text, ""
        if self._state == "before":
            bare = text.lstrip()
            if OPEN.startswith(bare) and bare != OPEN:
                self._held = text
                return []
            if not bare.startswith(OPEN):
                self._state, self._lead = "after", False
                return [("answer", text)]
            self._state = "open"
            text = bare[len(OPEN) :]
        pieces: list[tuple[Kind, str]] = []
        if self._state == "open":
            thought, tag, text = text.partition(CLOSE)
            if not tag:
                keep = overlap(thought, CLOSE)
                thought, self._held = thought[: len(thought) - keep], thought[len(thought) - keep :]
            pieces.append(("thinking", self._leading(thought)))
            if not tag:
                return [piece for piece in pieces if piece[1]]
            self._state, self._lead = "after", True
            self._ended = self._ended or "closed"
        pieces.append(("answer", self._leading(text)))
        return [piece for piece in pieces if piece[1]]

    def _leading(self, text: str) -> str:
        """Drop the blank lines that follow a tag."""
        if self._lead:
            text = text.lstrip()
            self._lead = not text
        return text
