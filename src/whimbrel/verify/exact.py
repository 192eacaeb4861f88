"""Answers that have one right form."""

from __future__ import annotations


def exact(answer: str, truth: str) -> bool:
    """Whether the whole answer is the truth, white space at both ends aside. A right number among others is wrong."""
    return bool(answer.strip()) and answer.strip() == truth.strip()
