"""Is this answer right? Verifiers by name: `math`, `choice`, `exact`, `needle`, `instructions`.

A verifier reads an answer and nothing else: no thought, no prompt. Two different final answers are none, so that a list
of guesses earns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from whimbrel.errors import UserError, nearest
from whimbrel.verify import choice, exact, instructions, math
from whimbrel.verify.verdict import Outcome, Verdict

VERIFIERS: Mapping[str, Callable[..., Verdict]] = {
    "math": math.check,
    "choice": choice.check,
    "exact": exact.check,
    "needle": exact.check_needle,
    "instructions": instructions.check,
}
"""Each takes (text, expected); `instructions` also the function that tells a text's language."""


def known(name: str) -> str:
    """The name of a verifier as it is; one that does not exist raises `UserError`."""
    if name not in VERIFIERS:
        raise UserError(f"verifier is {name!r}; {nearest(name, VERIFIERS)}")
    return name


def judge(name: str, response: str, expected: Any, detect: instructions.Detect | None = None) -> Verdict:
    """Hold a response against what its problem expects; an error of the grader is a verdict, never an exception.

    Of a response with thinking tags only what follows the last closing one is read; an open thought is no answer.
    `detect` tells the language of a text, for `instructions` alone.
    """
    closed = response.rpartition("</think>")[2]
    text = "" if closed.lstrip().startswith("<think>") else closed
    grade = VERIFIERS[known(name)]
    try:
        return grade(text, expected, *([detect] if name == "instructions" else []))
    except Exception as error:
        return Verdict("grader error", details={"error": f"{type(error).__name__}: {error}"})


def check(name: str, response: str, expected: Any) -> bool:
    """Is the response right? The short form of `judge`, for rewards."""
    return judge(name, response, expected).outcome == "correct"


__all__ = ["VERIFIERS", "Outcome", "Verdict", "check", "judge", "known"]
