"""The exact verifier: the whole answer or nothing. What tries to cheat it scores 0."""

from __future__ import annotations

import pytest

from whimbrel.errors import UserError
from whimbrel.verify import check


@pytest.mark.parametrize("answer", ["7", " 7", "7\n", "\n 7 \n\n"])
def test_right(answer: str) -> None:
    assert check("exact", answer, "7")
    assert check("exact", answer, "7\n")


@pytest.mark.parametrize(
    "answer",
    ["", " ", "-7", "77", "7 8", "8 7", "7.", "7, 8, 9", "5 or 7", "The answer is 7", "+7", "07", "7.0", "7\n7", "７"],
)
def test_wrong(answer: str) -> None:
    assert not check("exact", answer, "7")


def test_nothing_is_never_right() -> None:
    assert not check("exact", "", "")


def test_an_unknown_verifier_is_named() -> None:
    with pytest.raises(UserError, match="verifier is 'exakt'; did you mean 'exact'"):
        check("exakt", "7", "7")
