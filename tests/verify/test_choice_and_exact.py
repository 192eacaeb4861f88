"""Letters, whole texts and needles."""

from __future__ import annotations

import pytest

from whimbrel.verify import check, judge


@pytest.mark.parametrize(
    "answer",
    ["B", "(B)", " B.\n", "**B**", "B) the whimbrel", "\\boxed{B}", "\\boxed{\\text{(B)}}", "The answer is (B).",
     "Answer: B, because it flies.", "The correct answer is option B", "It is C? No. **Answer: B**"],
)  # fmt: skip
def test_a_letter_is_found(answer: str) -> None:
    assert check("choice", answer, "B")
    assert not check("choice", answer, "C")


@pytest.mark.parametrize(
    "cheat",
    ["A B C D", "ABCD", "\\boxed{A} \\boxed{B}", "\\boxed{AB}", "\\boxed{A, B}", "Answer: A. Answer: B.", "a b",
     "Which bird is it?\nA) the gull\nB) the whimbrel\nC) the tern", "By then it was late.", "A bird and B bird",
     "<think>B</think>", "The answer is Bird", "", "(A) (B)", "Answer: A or B"],
)  # fmt: skip
def test_cheats_for_a_letter_earn_nothing(cheat: str) -> None:
    assert not check("choice", cheat, "B")


def test_a_whole_text() -> None:
    assert check("exact", " the  whimbrel\n", "the whimbrel")
    assert check("exact", "caf\u0065\u0301", "caf\u00e9")
    assert check("exact", "b", ["a", "b"])
    for cheat in (
        "the whimbrel, a gull",
        "The whimbrel",
        "the whimbrel the whimbrel",
        "",
        "12 -3",
        "<think>the whimbrel",
    ):
        assert not check("exact", cheat, "the whimbrel")
    assert judge("exact", "", "a").outcome == "no answer"
    assert not check("exact", "", "")


def test_a_needle_is_found_alone() -> None:
    assert check("needle", "The code is 48213.", "48213")
    assert check("needle", "48213, I repeat: 48213. It was said 3 times.", "48213")
    for cheat in ("48213 48214", "148213", "482130", "", "The code is 4 8 2 1 3", "10000 " * 3 + "48213"):
        assert not check("needle", cheat, "48213")
    assert judge("needle", "I do not know", "48213").outcome == "no answer"
