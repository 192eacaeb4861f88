"""The letter of a multiple choice: boxed, after `answer is` or `answer:`, or a line such as `(B)` or `B. yes`."""

from __future__ import annotations

import re

from whimbrel.verify.final import boxed, plain, said
from whimbrel.verify.verdict import Verdict

_BOXED = re.compile(r"\(?([A-Z])\)?[.:)]?")
_SAID = re.compile(r"(?:option |choice )?\(?([A-Z])(?:[).:,\s*]|$)")
_LINE = re.compile(r"\s*\**(?:\(([A-Z])\)|([A-Z])[.):]|([A-Z])\**\s*$)[^\n]*\s*")


def check(text: str, expected: object) -> Verdict:
    """Hold the letter of a text against the expected one; two different letters are wrong, none is no answer."""
    letters = [match[1] if (match := _BOXED.fullmatch(plain(inner))) else plain(inner) for inner in boxed(text)]
    letters = letters or [match[1] for rest in said(text) if (match := _SAID.match(plain(rest)))]
    if not letters and (line := _LINE.fullmatch(text)):
        letters = [line[1] or line[2] or line[3]]
    different = list(dict.fromkeys(letters))
    if not different:
        return Verdict("no answer")
    right = different == [str(expected).strip("() .")]
    return Verdict("correct" if right else "wrong", " | ".join(different)[:200])
