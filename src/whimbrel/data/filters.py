"""Heuristics that tell prose from what only looks like it: Gopher's rules, with the thresholds of Nemotron recipes.

Each measure is a pure function from a `Prose` to one figure. The limits are the defaults of NeMo Curator's English
heuristics, which Nemotron-CC applies to its lesser pages (Gopher: Rae et al. 2021, appendix A.1).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from whimbrel.config import Settings

_BULLETS = ("•", "‣", "▪", "◦", "*", "-", "–", "·")
_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})  # Gopher's eight
_URL = re.compile(r"https?://\S+|www\.\S+")


class Limits(Settings):
    """What a document may measure. `null` switches a limit off. Shares lie between 0 and 1."""

    min_words: float | None = 50
    max_words: float | None = 100_000
    min_mean_word: float | None = 3
    max_mean_word: float | None = 10
    max_longest_word: float | None = 1000
    min_stop_words: float | None = 2
    """How many different ones of the, be, to, of, and, that, have, with. Meant for English."""
    min_alphabetic: float | None = 0.8
    """Share of words with a letter in them."""
    max_signs: float | None = 0.25
    """Share of characters that are neither letter, digit nor white space."""
    max_digits: float | None = 0.15
    max_blanks: float | None = 0.25
    """Share of white space, indentation not counted: code is indented and is no junk."""
    max_symbols: float | None = 0.1
    """Number signs and ellipses a word."""
    max_urls: float | None = 0.2
    max_bullets: float | None = 0.9
    max_ellipses: float | None = 0.3
    min_unique_lines: float | None = 0.7
    min_unique_line_characters: float | None = 0.8
    max_top_2gram: float | None = 0.2
    max_top_3gram: float | None = 0.18
    max_top_4gram: float | None = 0.16
    max_repeated_5gram: float | None = 0.15
    max_repeated_10gram: float | None = 0.1


@dataclass(frozen=True)
class Prose:
    """A text, cut up once for all measures."""

    text: str

    @cached_property
    def words(self) -> list[str]:
        """What stands between white space."""
        return self.text.split()

    @cached_property
    def vocabulary(self) -> Counter[str]:
        """Different words, and how often each occurs."""
        return Counter(self.words)

    @cached_property
    def characters(self) -> Counter[str]:
        """Different characters, and how often each occurs."""
        return Counter(self.text)

    def count(self, kind: Callable[[str], bool]) -> int:
        """Characters of a kind, such as str.isdigit."""
        return sum(number for character, number in self.characters.items() if kind(character))

    @cached_property
    def lines(self) -> list[str]:
        """Lines with something in them, without the blanks around it."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def word_ids(self) -> NDArray[np.uint64]:
        """A number for each word, equal for equal words."""
        numbers = {word: number for number, word in enumerate(self.vocabulary, 1)}
        return np.fromiter(map(numbers.__getitem__, self.words), np.uint64, len(self.words))

    @cached_property
    def word_sizes(self) -> NDArray[np.int64]:
        """Characters of each word."""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    def grams(self, n: int) -> NDArray[np.uint64]:
        """A 64-bit hash of the n words from each place on."""
        ids = self.word_ids
        count = max(len(ids) - n + 1, 0)
        hashes = np.zeros(count, np.uint64)
        for shift in range(n):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[shift : shift + count]
        return hashes


def share(part: float, whole: float) -> float:
    """part / whole, 0 of nothing."""
    return part / whole if whole else 0.0


def words(prose: Prose) -> float:
    """Number of words."""
    return len(prose.words)


def mean_word(prose: Prose) -> float:
    """Mean characters of a word."""
    return share(float(prose.word_sizes.sum()), len(prose.words))


def longest_word(prose: Prose) -> float:
    """Characters of the longest word."""
    return float(prose.word_sizes.max(initial=0))


def stop_words(prose: Prose) -> float:
    """How many of the eight commonest function words occur."""
    return len(_STOP_WORDS & {word.lower().strip(".,;:()") for word in prose.vocabulary})


def alphabetic(prose: Prose) -> float:
    """Share of words with at least one letter."""
    return share(sum(n for word, n in prose.vocabulary.items() if any(map(str.isalpha, word))), len(prose.words))


def signs(prose: Prose) -> float:
    """Share of characters that are neither letter, digit nor white space."""
    return share(prose.count(lambda c: not c.isalnum() and not c.isspace()), len(prose.text))


def digits(prose: Prose) -> float:
    """Share of digits in the characters."""
    return share(prose.count(str.isdigit), len(prose.text))


def blanks(prose: Prose) -> float:
    """Share of white space in the characters of the lines, each without the blanks around it."""
    total = sum(map(len, prose.lines))
    return share(total - prose.count(lambda c: not c.isspace()), total)


def symbols(prose: Prose) -> float:
    """Number signs and ellipses for each word."""
    return share(prose.text.count("#") + prose.text.count("...") + prose.text.count("…"), len(prose.words))


def urls(prose: Prose) -> float:
    """Share of characters inside web addresses."""
    return share(sum(len(url) for url in _URL.findall(prose.text)), len(prose.text))


def bullets(prose: Prose) -> float:
    """Share of lines that begin with a bullet."""
    return share(sum(line.startswith(_BULLETS) for line in prose.lines), len(prose.lines))


def ellipses(prose: Prose) -> float:
    """Share of lines that end in an ellipsis."""
    return share(sum(line.endswith(("...", "…")) for line in prose.lines), len(prose.lines))


def unique_lines(prose: Prose) -> float:
    """Different lines for each line; 1 where nothing repeats."""
    return share(len(set(prose.lines)), len(prose.lines)) if prose.lines else 1.0


def unique_line_characters(prose: Prose) -> float:
    """Characters of the different lines for each character of all lines."""
    return share(sum(map(len, set(prose.lines))), sum(map(len, prose.lines))) if prose.lines else 1.0


def top_gram(prose: Prose, n: int) -> float:
    """Share of the words' characters in the commonest sequence of n words; 0 where none occurs twice."""
    _, first, counts = np.unique(prose.grams(n), return_index=True, return_counts=True)
    if not len(counts) or counts.max() < 2:
        return 0.0
    sizes = np.convolve(prose.word_sizes, np.ones(n, np.int64), "valid")[first]
    return share(float((sizes * counts)[counts == counts.max()].max()), float(prose.word_sizes.sum()))


def repeated_gram(prose: Prose, n: int) -> float:
    """Share of the words' characters inside sequences of n words that stood in the text before."""
    grams = prose.grams(n)
    again = np.ones(len(grams), bool)
    again[np.unique(grams, return_index=True)[1]] = False
    covered = np.zeros(len(prose.words), bool)
    for shift in range(n):
        covered[shift : shift + len(grams)] |= again
    return share(float(prose.word_sizes[covered].sum()), float(prose.word_sizes.sum()))


@dataclass(frozen=True)
class Drop:
    """Why a document goes: the measure that decided, its figure, and the limit in words."""

    reason: str
    figure: float | None = None
    detail: str = ""


MEASURES: dict[str, Callable[[Prose], float]] = {
    "words": words,
    "mean_word": mean_word,
    "longest_word": longest_word,
    "stop_words": stop_words,
    "alphabetic": alphabetic,
    "signs": signs,
    "digits": digits,
    "blanks": blanks,
    "symbols": symbols,
    "urls": urls,
    "bullets": bullets,
    "ellipses": ellipses,
    "unique_lines": unique_lines,
    "unique_line_characters": unique_line_characters,
    "top_2gram": lambda prose: top_gram(prose, 2),
    "top_3gram": lambda prose: top_gram(prose, 3),
    "top_4gram": lambda prose: top_gram(prose, 4),
    "repeated_5gram": lambda prose: repeated_gram(prose, 5),
    "repeated_10gram": lambda prose: repeated_gram(prose, 10),
}


def check(text: str, limits: Limits) -> Drop | None:
    """The first limit that a text breaks, in the order of `Limits`; None if it breaks none."""
    prose = Prose(text)
    for name in type(limits).model_fields:
        limit = getattr(limits, name)
        side, _, measure = name.partition("_")
        if limit is None:
            continue
        figure = MEASURES[measure](prose)
        if figure < limit if side == "min" else figure > limit:
            return Drop(measure, figure, f"{side} {limit:g}")
    return None
