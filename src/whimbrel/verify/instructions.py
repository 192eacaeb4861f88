"""IFEval's verifiable instructions (Zhou et al. 2023, arXiv 2311.07911): 25 rules on the text of an answer.

The verdicts are those of lm-eval's rules, oddities and all, so that figures compare; `docs/verify.md` says where a
verdict can differ. `strict` reads the answer as it is; `loose` is content if one of eight forms follows the rule: with
or without its first line, its last line, and its asterisks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from whimbrel.verify import sentences
from whimbrel.verify.verdict import Outcome, Verdict

Detect = Callable[[str], str]
"""The language of a text as an ISO 639-1 code; empty where it cannot be told."""

_YES_NO_MAYBE = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _compare(count: int, relation: str, threshold: int) -> bool:
    assert relation in ("less than", "at least"), relation
    return count < threshold if relation == "less than" else count >= threshold


def _parts(text: str, divider: str) -> list[str] | None:
    """The parts between dividers that are not empty; None if an empty one stands in the middle."""
    parts = re.split(divider, text)
    if any(not part.strip() for part in parts[1:-1]):
        return None
    return [part for part in parts if part.strip()]


def _bullets(text: str) -> int:
    return len(re.findall(r"^\s*\*[^*].*$", text, re.M)) + len(re.findall(r"^\s*-.*$", text, re.M))


def _highlights(text: str) -> int:
    single = [found.strip("*") for found in re.findall(r"\*[^\n*]*\*", text)]
    double = [found[2:-2] for found in re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(bool(found.strip()) for found in (*single, *double))


def _sections(text: str, section_spliter: str) -> int:
    return len(re.findall(rf"\s?{section_spliter.strip()}\s?\d+\s?", text))


def _two_responses(text: str) -> bool:
    parts = _parts(text, re.escape("******"))
    return parts is not None and len(parts) == 2 and parts[0].strip() != parts[1].strip()


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = text.split("\n\n")
    full = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if full != num_paragraphs or nth_paragraph > full or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(patterns.get(marker, marker.lower()), text.lower()) is not None


def _json(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _in(language: str, text: str, detect: Detect) -> bool:
    return not any(map(str.isalpha, text)) or detect(text) in (language, "")


RULES: Mapping[str, Callable[..., bool]] = {
    "keywords:existence": lambda t, _, keywords: all(re.search(k, t, re.I) for k in keywords),
    "keywords:forbidden_words": lambda t, _, forbidden_words: (
        not any(re.search(rf"\b{word}\b", t, re.I) for word in forbidden_words)
    ),
    "keywords:frequency": lambda t, _, keyword, frequency, relation: _compare(
        len(re.findall(keyword.strip(), t, re.I)), relation, frequency
    ),
    "keywords:letter_frequency": lambda t, _, letter, let_frequency, let_relation: _compare(
        t.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "language:response_language": lambda t, detect, language: _in(language, t, detect),
    "length_constraints:number_sentences": lambda t, _, num_sentences, relation: _compare(
        sentences.count(t), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": lambda t, _, num_paragraphs: (
        len(_parts(t, r"\s?\*\*\*\s?") or ()) == num_paragraphs
    ),
    "length_constraints:number_words": lambda t, _, num_words, relation: _compare(
        len(re.findall(r"\w+", t)), relation, num_words
    ),
    "length_constraints:nth_paragraph_first_word": lambda t, _, **wanted: _nth_paragraph(t, **wanted),
    "detectable_content:number_placeholders": lambda t, _, num_placeholders: (
        len(re.findall(r"\[.*?\]", t)) >= num_placeholders
    ),
    "detectable_content:postscript": lambda t, _, postscript_marker: _postscript(t, postscript_marker),
    "detectable_format:number_bullet_lists": lambda t, _, num_bullets: _bullets(t) == num_bullets,
    "detectable_format:constrained_response": lambda t, _: any(option in t for option in _YES_NO_MAYBE),
    "detectable_format:number_highlighted_sections": lambda t, _, num_highlights: _highlights(t) >= num_highlights,
    "detectable_format:multiple_sections": lambda t, _, section_spliter, num_sections: (
        _sections(t, section_spliter) >= num_sections
    ),
    "detectable_format:json_format": lambda t, _: _json(t),
    "detectable_format:title": lambda t, _: _title(t),
    "combination:two_responses": lambda t, _: _two_responses(t),
    "combination:repeat_prompt": lambda t, _, prompt_to_repeat: (
        t.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda t, _, end_phrase: t.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    "startend:quotation": lambda t, _: _quoted(t),
    "change_case:capital_word_frequency": lambda t, _, capital_frequency, capital_relation: _compare(
        sum(word.isupper() for word in sentences.words(t)), capital_relation, capital_frequency
    ),
    "change_case:english_capital": lambda t, detect: t.isupper() and _in("en", t, detect),
    "change_case:english_lowercase": lambda t, detect: t.islower() and _in("en", t, detect),
    "punctuation:no_comma": lambda t, _: "," not in t,
}
"""Every rule takes (text, detect, **its own arguments)."""


def follow(text: str, instruction: str, arguments: Mapping[str, Any], detect: Detect) -> bool:
    """Does a text follow one instruction? Empty arguments are left out; an unknown instruction is a KeyError."""
    given = {name: value for name, value in arguments.items() if value}
    return bool(text.strip()) and bool(RULES[instruction](text, detect, **given))


def forms(text: str) -> list[str]:
    """The eight forms in which `loose` reads an answer."""
    lines = text.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [form for whole in (text, *cut) for form in (whole, whole.replace("*", ""))]


def check(text: str, expected: Mapping[str, Sequence[Any]], detect: Detect) -> Verdict:
    """Hold a text against `{"instructions": [name], "arguments": [{…}]}`; correct if all are followed strictly."""
    pairs = list(zip(expected["instructions"], expected["arguments"], strict=True))
    strict = [follow(text, name, arguments, detect) for name, arguments in pairs]
    loose = [any(follow(form, name, arguments, detect) for form in forms(text)) for name, arguments in pairs]
    outcome: Outcome = "no answer" if not text.strip() else "correct" if all(strict) else "wrong"
    return Verdict(outcome, None, {"strict": strict, "loose": loose})
