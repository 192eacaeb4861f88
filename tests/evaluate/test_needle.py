"""Needles stand where they should, in texts as long as was asked for."""

from __future__ import annotations

import pytest

from whimbrel.errors import UserError
from whimbrel.evaluate.needle import NeedleSettings, needles
from whimbrel.verify import judge


def words(text: str) -> int:
    return len(text.split())


def test_lengths_depths_and_answers() -> None:
    settings = NeedleSettings(lengths=(100, 400), samples=5, codes=3)
    items = needles(settings, words, 0)
    assert [item.group for item in items] == ["100 tokens"] * 5 + ["400 tokens"] * 5
    for item in items:
        text, _, question = str(item.prompt).partition("\n\n")
        assert int(item.group.split()[0]) - 11 < words(text) <= int(item.group.split()[0])
        name = question.removeprefix("What is the code of the ").partition("?")[0]
        assert text.count(f"The code of the {name} is {item.expected}.") == 1
        assert text.count("The code of the") == 3
        assert judge("needle", f" {item.expected}", item.expected).outcome == "correct"
        assert judge("needle", text, item.expected).outcome == "wrong"  # every code in a row
    depths = []
    for item in items[5:]:
        text = str(item.prompt).partition("\n\n")[0]
        depths.append(text.index(item.expected) / len(text))
    assert depths == sorted(depths)
    assert depths[0] < 0.1
    assert depths[-1] > 0.9


def test_the_same_seed_draws_the_same_texts() -> None:
    settings = NeedleSettings(lengths=(100,), samples=2)
    assert needles(settings, words, 0) == needles(settings, words, 0) != needles(settings, words, 1)
    longer = needles(NeedleSettings(lengths=(50, 100), samples=2), words, 0)
    assert longer[2:] == needles(settings, words, 0)


def test_a_length_too_short_for_its_codes_is_refused() -> None:
    with pytest.raises(UserError, match=r"needle\.lengths holds 20, too few for 4 codes; set it to 3"):
        needles(NeedleSettings(lengths=(20,)), words, 0)
