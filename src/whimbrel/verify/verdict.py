"""What a verifier says of one answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["correct", "wrong", "no answer", "grader error"]


@dataclass(frozen=True)
class Verdict:
    """`wrong`: an answer was read and is not right; `no answer`: there was none to read; `grader error`: our fault."""

    outcome: Outcome
    extracted: str | None = None
    """What was taken for the answer, in a form in which equal answers are equal texts; None if nothing was."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """More, by verifier: `strict` and `loose` of each instruction, or the `error`."""
