"""Final answers are read in the forms people write them, and what only looks like one earns nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import UserError
from whimbrel.verify import check, judge


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("So she makes \\boxed{18} dollars.", "18"),
        ("$\\boxed{\\$1{,}234.50}$", "1234.5"),
        ("\\boxed{ 70\\,000 }", "70000"),
        ("\\boxed{18\\text{ eggs}}", "18"),
        ("\\boxed{x = 18}", "18"),
        ("\\boxed{073}", "73"),
        ("\\boxed{-\\frac{3}{4}}", "-0.75"),
        ("\\boxed{\\dfrac34}", "3/4"),
        ("\\boxed{2\\frac{1}{2}}", "2.5"),
        ("\\boxed{1 1/2}", "3/2"),
        ("\\boxed{90^\\circ}", "90"),
        ("\\boxed{\\frac{\\frac{1}{2}}{x}}", "\\frac{\\frac{1}{2}}{x}"),
        ("\\boxed{50\\%}", "50"),
        ("\\boxed{50%}", "0.5"),
        ("\\boxed{0.5}", "50%"),
        ("5 + 4 = 9\n#### 1,234", "1234"),
        ("The answer is $18.", "18"),
        ("**Answer:** 18 dollars per day.", "18"),
        ("The final answer is:\n18", "18"),
        ("The answer is 16 - 7 = 9.", "9"),
        ("18", "18"),
        (" -3\n", "-3"),
        ("€2.50", "5/2"),
        ("\\boxed{7} so the answer is \\boxed{7.0}", "7"),
        ("<think>no: \\boxed{3}</think>\\boxed{4}", "4"),
    ],
)
def test_right(answer: str, expected: str) -> None:
    assert judge("math", answer, expected).outcome == "correct"


CHEATS = {
    "two boxes": "\\boxed{17} or \\boxed{18}",
    "every number": "".join(f"\\boxed{{{n}}} " for n in range(30)),
    "a list in a box": "\\boxed{16, 17, 18}",
    "a list with spaces": "\\boxed{16 17 18}",
    "a choice in a box": "\\boxed{18 or 19}",
    "a choice in words": "\\boxed{18 (or nineteen)}",
    "said twice": "The answer is 17. The answer is 18.",
    "lines": "#### 17\n#### 18",
    "the thought": "<think>\\boxed{18}</think>I am not sure.",
    "an open thought": "<think>\\boxed{18}",
    "the prompt again": "How many eggs? Write the final answer as \\boxed{}. There are 18 eggs.",
    "counting up": "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18",
    "counting lines": "\n".join(map(str, range(1, 19))),
    "an equation for each": "1=2=3=18",
    "a box in a box": "\\boxed{\\boxed{18} \\boxed{19}}",
    "nothing": "",
    "white space": " \n\t",
    "an empty box": "\\boxed{} 18",
    "a box left open": "\\boxed{18",
    "negative": "\\boxed{-18}",
    "double sign": "\\boxed{--18}",
    "nearly": "\\boxed{18.0000001}",
    "division": "\\boxed{18/0}",
    "a power": "\\boxed{18^1}",
    "a long one": "\\boxed{" + "9" * 10_000 + "}",
    "a range": "\\boxed{1-100}",
    "more than": "\\boxed{<100}",
    "a tie of percent": "\\boxed{1800%%}",
    "the verdict": "correct",
}


@pytest.mark.parametrize("cheat", CHEATS.values(), ids=CHEATS)
def test_cheats_earn_nothing(cheat: str) -> None:
    verdict = judge("math", cheat, "18")
    assert verdict.outcome in ("wrong", "no answer")
    assert not check("math", cheat, "18")


def test_what_was_read_is_shown_in_one_form() -> None:
    assert {judge("math", f"\\boxed{{{form}}}", "1").extracted for form in ("0.75", "3/4", "\\frac{6}{8}", "+.75")} == {
        "3/4"
    }
    assert judge("math", "\\boxed{17} \\boxed{18}", "18").extracted == "17 | 18"
    assert judge("math", "I do not know.", "18").outcome == "no answer"


@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=999))
def test_every_fraction_is_itself_and_no_other(value) -> None:
    sign, top = ("-" if value < 0 else ""), abs(value.numerator)
    written = f"{sign}\\frac{{{top:,}}}{{{value.denominator}}}"
    assert check("math", f"\\boxed{{{written}}}", f"{value.numerator}/{value.denominator}")
    assert not check("math", f"\\boxed{{{written}}}", str(value + 1))


@given(st.text(max_size=60), st.sampled_from(["math", "choice", "exact", "needle"]))
def test_no_text_breaks_a_verifier(text: str, name: str) -> None:
    assert judge(name, text, "\\boxed{a}").outcome != "grader error"


def test_a_grader_that_fails_says_so_and_an_unknown_one_is_refused() -> None:
    verdict = judge("instructions", "text", {"instructions": ["no:such"], "arguments": [{}]}, lambda text: "en")
    assert verdict.outcome == "grader error"
    assert "no:such" in verdict.details["error"]
    with pytest.raises(UserError, match="did you mean 'math'"):
        judge("maths", "1", "1")
