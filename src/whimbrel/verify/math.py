"""Final answers of mathematics, compared as exact fractions.

Read are, the first kind that occurs: `\\boxed{…}`, a line `#### …`, `answer is …` / `answer: …`, or a text that is
nothing but a number. All of that kind must agree. Numbers may have a sign, a currency, separators of thousands (comma
or space, groups of three), a point, be a fraction (`3/4`, `\\frac{3}{4}`, `1 \\frac{1}{2}`), and be followed by a
unit. What is no number is compared as text. Not done: algebra (`x+1` is not `1+x`), roots, powers, sets.
"""

from __future__ import annotations

import re
from fractions import Fraction

from whimbrel.verify.final import boxed, plain, said
from whimbrel.verify.verdict import Verdict

ASK = "\n\nThink step by step, and write the final answer as \\boxed{}."
"""What follows a problem, so that its answer has a form read here; the box is empty: repeating it answers nothing."""
_LONGEST = 60  # digits; nobody expects a longer number, and reading it would take time
_DECIMAL = r"(?:(?:\d{1,3}(?:[, \u00a0\u202f]\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    r"(?P<sign>[-−–+]?)\s*[$€£¥₹]?\s*(?P<inner>[-−–]?)"
    rf"(?:(?P<whole>\d+\s*)?\\frac\{{(?P<top>{_DECIMAL})\}}\{{(?P<bottom>{_DECIMAL})\}}"
    r"|(?P<whole2>\d+ +)?(?P<top2>\d+)\s*/\s*(?P<bottom2>\d+)"
    rf"|(?P<plain>{_DECIMAL}))"
    r"(?P<percent>\s*%)?(?P<unit>[^\d=+*/\\<>|;{},:?%]{0,60})"
)
_MORE = re.compile(r"\b(?:or|and|not|to|nor)\b", re.IGNORECASE)
_LINE = re.compile(r"^[ \t]*####[ \t]*(.+)$", re.MULTILINE)


def check(text: str, expected: object) -> Verdict:
    """Hold the final answer of a text against the expected one (a number or text in any form that is read here)."""
    found = finals(text)
    different = list(dict.fromkeys(canonical(answer) for answer in found))
    if len(different) > 1 or not different:
        return Verdict("wrong", " | ".join(different)[:200]) if different else Verdict("no answer")
    return Verdict("correct" if equal(found[0], str(expected)) else "wrong", different[0][:200])


def finals(text: str) -> list[str]:
    """Every final answer of the first kind that occurs, in order."""
    return boxed(text) or _LINE.findall(text) or said(text) or ([text] if "=" not in text and read(text) else [])


def read(text: str) -> tuple[Fraction, bool] | None:
    """The number a text consists of, and whether a percent sign follows it; None if it is no single number.

    Of an equation the right side is read.
    """
    text = re.sub(r"\\[dt]frac", r"\\frac", plain(text).rpartition("=")[2].strip(" $"))
    match = _NUMBER.fullmatch(re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text))
    if match is None or _MORE.search(match["unit"]) or (match["sign"] and match["inner"]):
        return None
    parts = (
        match["whole"] or match["whole2"] or "0",
        match["top"] or match["top2"] or match["plain"],
        match["bottom"] or match["bottom2"] or "1",
    )
    whole, top, bottom = (re.sub(r"[,\s]", "", part) for part in parts)
    if max(len(whole), len(top), len(bottom)) > _LONGEST or not Fraction(bottom):
        return None
    value = Fraction(whole) + Fraction(top) / Fraction(bottom)
    return (value if match["sign"] in ("", "+") and not match["inner"] else -value), bool(match["percent"])


def canonical(text: str) -> str:
    """A text that equal answers share: the fraction in lowest terms, or the text without white space."""
    number = read(text)
    return str(number[0]) if number else re.sub(r"\s+", "", plain(text))


def equal(given: str, expected: str) -> bool:
    """Are two answers the same? `50 %` is 50, and it is 0.5 where only one of the two has the sign."""
    left, right = read(given), read(expected)
    if left is None or right is None:
        return left is right and canonical(given) == canonical(expected)
    if left[0] == right[0]:
        return True
    return left[1] != right[1] and left[0] / (100 if left[1] else 1) == right[0] / (100 if right[1] else 1)
