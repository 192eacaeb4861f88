"""Answers that must be the expected text itself, and codes that must be found in a haystack."""

from __future__ import annotations

import re
import unicodedata

from whimbrel.verify.verdict import Verdict


def check(text: str, expected: object) -> Verdict:
    """The whole text is the expected one, or one of a list of them, but for white space and composed Unicode."""
    given = normal(text)
    wanted = [normal(str(one)) for one in (expected if isinstance(expected, list) else [expected])]
    return Verdict("correct" if given in wanted else "wrong", given[:200]) if given else Verdict("no answer")


def normal(text: str) -> str:
    """Composed Unicode, each run of white space one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def check_needle(text: str, expected: object) -> Verdict:
    """The expected number occurs in the text and no other one of as many digits: quoting all of them is wrong."""
    found = list(dict.fromkeys(re.findall(rf"(?<!\d)\d{{{len(str(expected))}}}(?!\d)", text)))
    if not found:
        return Verdict("no answer")
    return Verdict("correct" if found == [str(expected)] else "wrong", " | ".join(found)[:200])
