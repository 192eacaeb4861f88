"""Is this answer right? Functions of an answer and the truth, named in the rows they judge."""

from __future__ import annotations

from whimbrel.errors import UserError
from whimbrel.verify.exact import exact


def check(verifier: str, answer: str, truth: str) -> bool:
    """Whether the verifier of this name takes the answer (the text after the thought) for right."""
    if verifier != "exact":
        raise UserError(f"verifier is {verifier!r}; set verifier to exact")
    return exact(answer, truth)
