"""IFEval's 25 rules: verdicts equal to lm-eval's on recorded answers, and edges that the record does not reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from whimbrel.data.language import detect
from whimbrel.verify import instructions, judge
from whimbrel.verify.instructions import RULES, follow, forms
from whimbrel.verify.sentences import count, words

RECORD = [json.loads(line) for line in Path(__file__).with_name("ifeval_answers.jsonl").read_text("utf-8").splitlines()]
NTH = "length_constraints:nth_paragraph_first_word"


def language(text: str) -> str:
    return detect(text)[0]


@pytest.mark.parametrize("row", RECORD, ids=lambda row: str(row["key"]))
def test_the_verdicts_are_those_of_lm_eval(row: dict[str, Any]) -> None:
    verdict = judge("instructions", row["answer"], row, language)
    assert verdict.details == {"strict": row["strict"], "loose": row["loose"]}
    assert (verdict.outcome == "correct") == all(row["strict"])


def test_the_record_holds_each_rule_followed_and_broken() -> None:
    seen = {
        (name, mode, value)
        for row in RECORD
        for mode in ("strict", "loose")
        for name, value in zip(row["instructions"], row[mode], strict=True)
    }
    assert len(RULES) == 25
    assert {(name, "strict", value) for name in RULES for value in (True, False)} <= seen
    assert any(row["strict"] != row["loose"] for row in RECORD)


@pytest.mark.parametrize(
    ("name", "arguments", "text", "expected"),
    [
        ("keywords:existence", {"keywords": ["sea"]}, "A search.", True),  # a part of a word will do, as in lm-eval
        ("keywords:forbidden_words", {"forbidden_words": ["sea"]}, "A search.", True),
        ("keywords:forbidden_words", {"forbidden_words": ["sea"]}, "the SEA!", False),
        ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, "##", True),
        ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one-two", True),
        ("length_constraints:number_words", {"num_words": 2, "relation": "less than"}, "one-two", False),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\n***\nb", False),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb\n***", True),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 1}, "a", True),
        (NTH, {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "sea"}, "a\n\n\"Sea, b", True),
        (NTH, {"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "sea"}, "sea", False),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b\n** c", True),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* ** ** *b*", True),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "* *", False),
        ("detectable_format:title", {}, "<< >>", False),
        ("detectable_format:json_format", {}, "```json\n{\"a\": }\n```", False),
        ("detectable_format:json_format", {}, "[" * 100_000, False),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "p. p. s. yes", True),
        ("combination:two_responses", {}, "a\n******\na", False),
        ("combination:two_responses", {}, "a******b******c", False),
        ("startend:quotation", {}, '"', False),
        ("change_case:english_capital", {}, "THE SEA WAS CALM. 3", True),
        ("change_case:english_lowercase", {}, "Das Meer war ruhig", False),
        ("punctuation:no_comma", {}, "a，b", True),
        ("language:response_language", {"language": "kn"}, "*** 7", True),
    ],
)  # fmt: skip
def test_edges(name: str, arguments: dict[str, Any], text: str, expected: bool) -> None:
    assert follow(text, name, arguments, language) is expected


@pytest.mark.parametrize("text", ["", " \n ", "<think>It follows every rule.", "<think>a</think>"])
def test_no_answer_follows_nothing(text: str) -> None:
    everything = {"instructions": ["punctuation:no_comma"], "arguments": [{}]}
    verdict = judge("instructions", text, everything, language)
    assert verdict.outcome == "no answer"
    assert verdict.details == {"strict": [False], "loose": [False]}


def test_loose_forms_leave_out_first_and_last_line_and_asterisks() -> None:
    assert forms("a\n*b*\nc") == ["a\n*b*\nc", "a\nb\nc", "*b*\nc", "b\nc", "a\n*b*", "a\nb", "*b*", "b"]
    row = {"instructions": ["change_case:english_lowercase"], "arguments": [{}]}
    said = "Sure! Here it is:\nthe sea was calm and the birds went north."
    assert instructions.check(said, row, language).details == {"strict": [False], "loose": [True]}


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", 0), ("one", 1), ("One. Two! Three?", 3), ("Mr. Gull came at 4 p.m. sharp.", 1), ("No end\nof line", 1),
        ("1. one 2. two", 1), ("1. One 2. Two", 3), ('"Really?" he said.', 2), ("He waits... and waits.", 1),
        ("It costs 3.50 in the U.S. today. Yes.", 2), ("Is it so?\"", 1), ("Wait... The tide turns.", 2),
    ],
)  # fmt: skip
def test_sentences(text: str, sentences: int) -> None:
    assert count(text) == sentences


def test_words_are_cut_as_in_the_treebank() -> None:
    assert words("I DON'T know, it CANNOT be (U.S.) GO-THERE: 1:30!") == [
        "I", "DO", "N'T", "know", "it", "CAN", "NOT", "be", "U.S.", "GO-THERE", "1:30",
    ]  # fmt: skip
