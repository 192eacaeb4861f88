"""Every measure by hand, every limit with a text that keeps it and one that breaks it."""

import pytest

from whimbrel.data import filters
from whimbrel.data.filters import Limits, Prose, check

OFF = Limits(**dict.fromkeys(Limits.model_fields))
GOOD = """\
The whimbrel is a wader that breeds on the heaths of the north and spends the winter on coasts of the south.
Small flocks have been seen to leave the shore at dusk, calling, and to turn out over open water.
Nobody on a boat would give a bird of that size much of a chance against weather of this kind.
Its bill bends downwards, with which it picks crabs from their holes in mud or sand.
Some fly from Canada past the Caribbean without a stop, straight through storms that ships avoid.
A transmitter of five grams told us how long such a journey takes: four days and as many nights.
When they arrive they weigh half as much as before, so they eat almost without rest for two weeks.
Hunters on certain islands used to wait for tired flocks to come down after every gale.
Today several of those marshes belong to clubs which count what lands there instead.
We still do not know what decides between waiting and going; wind explains only part of it."""


@pytest.mark.parametrize(
    ("measure", "text", "figure"),
    [
        (filters.words, "one two  three\nfour", 4),
        (filters.words, "", 0),
        (filters.mean_word, "a bbb cc", 2),
        (filters.mean_word, "", 0),
        (filters.longest_word, "a bbb cc", 3),
        (filters.stop_words, "The end of THE (that) story, with-out", 3),
        (filters.alphabetic, "a1 22 b -", 0.5),
        (filters.signs, "ab, c!", 2 / 6),
        (filters.digits, "a1b22 ", 3 / 6),
        (filters.blanks, "    ab c\n\n  d\n", 1 / 5),  # indentation and line ends are no blanks
        (filters.symbols, "# one ... two… three", 3 / 5),
        (filters.urls, "see https://a.b/c now", 13 / 21),
        (filters.bullets, "• a\n- b\n\nc\n  * d", 3 / 4),
        (filters.ellipses, "a...\nb\nc…\nd. .", 2 / 4),
        (filters.unique_lines, "a\nb\na\n\n a ", 2 / 4),
        (filters.unique_lines, "", 1),
        (filters.unique_line_characters, "aaa\nb\naaa", 4 / 7),
        (lambda p: filters.top_gram(p, 2), "a bb a bb a cc", 6 / 9),
        (lambda p: filters.top_gram(p, 2), "a b c d", 0),
        (lambda p: filters.top_gram(p, 4), "a b c", 0),
        (lambda p: filters.repeated_gram(p, 2), "aa b c aa b d", 3 / 8),
        (lambda p: filters.repeated_gram(p, 3), "a b a b a b", 4 / 6),
        (lambda p: filters.repeated_gram(p, 5), "a b c", 0),
    ],
)
def test_figures(measure: filters.Callable[[Prose], float], text: str, figure: float) -> None:
    assert measure(Prose(text)) == pytest.approx(figure, abs=1e-12)


BAD = {
    "min_words": "the few and the proud",
    "max_words": "the bird and that wader " * 25_001,
    "min_mean_word": "a to of it is be we " * 20,
    "max_mean_word": "the and extraordinarily incomprehensibilities " * 20,
    "max_longest_word": GOOD + " " + "x" * 1001,
    "min_stop_words": "Whimbrels cross oceans without landing " * 15,
    "min_alphabetic": GOOD + " 17" * 120,
    "max_signs": GOOD + " ((a)); {{b}}; [[c]];" * 80,
    "max_digits": GOOD + " a1234567890" * 60,
    "max_blanks": GOOD.replace(" ", "   "),
    "max_symbols": GOOD + " #tag" * 60,
    "max_urls": GOOD + " https://example.org/a/b/c" * 40,
    "max_bullets": "\n".join("- " + line for line in GOOD.split("\n")),
    "max_ellipses": GOOD.replace(".", "..."),
    "min_unique_lines": GOOD + "\nAgain." * 20,
    "min_unique_line_characters": GOOD + ("\n" + "and so on with one long line that comes again and again " * 3) * 4,
    "max_top_2gram": GOOD + " sandpiper lagoon" * 60,
    "max_top_3gram": GOOD + " sandpiper lagoon dune" * 30,
    "max_top_4gram": GOOD + " sandpiper lagoon dune isle" * 30,
    "max_repeated_5gram": "\n".join([*GOOD.split("\n"), *GOOD.split("\n")[:4]]),
    "max_repeated_10gram": "\n".join([*GOOD.split("\n"), *GOOD.split("\n")[:4]]),
}


def test_every_limit_has_its_case() -> None:
    assert set(BAD) == set(Limits.model_fields)


def test_good_prose_breaks_no_limit() -> None:
    assert check(GOOD, Limits()) is None


@pytest.mark.parametrize("limit", BAD)
def test_a_limit_drops_what_breaks_it_and_nothing_else(limit: str) -> None:
    default = Limits.model_fields[limit].default
    alone = OFF.model_copy(update={limit: default})
    drop = check(BAD[limit], alone)
    assert drop is not None and drop.reason == limit.partition("_")[2] and drop.figure is not None
    assert drop.detail == f"{limit[:3]} {default:g}"
    assert drop.figure < default if limit.startswith("min") else drop.figure > default
    assert check(GOOD, alone) is None
    assert check(BAD[limit], OFF) is None  # null switches it off


def test_the_first_limit_broken_is_the_reason() -> None:
    drop = check("17 18", Limits())
    assert drop is not None and (drop.reason, drop.figure, drop.detail) == ("words", 2, "min 50")


def test_a_limit_itself_is_allowed() -> None:
    exactly = OFF.model_copy(update={"min_words": 5, "max_words": 5})
    assert check("one two three four five", exactly) is None
    assert (
        check("one two three four", exactly) is not None and check("one two three four five six", exactly) is not None
    )
