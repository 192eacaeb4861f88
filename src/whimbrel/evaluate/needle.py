"""Needles: a code that stands somewhere in a long text must be found again, among other codes of the same form.

In the manner of RULER's multi-key task (Hsieh et al. 2024), with sentences of our own. A length is that of the text to
be searched, in tokens of the model's vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from pydantic import Field

from whimbrel.config import Settings
from whimbrel.errors import UserError
from whimbrel.evaluate.tasks import Item

_NOISE = (
    "The tide was out and the mud shone in the sun.",
    "A boat lay on its side and waited for the water.",
    "Far away a train crossed the bridge without a sound.",
    "Nobody had seen the heron since the morning.",
    "Small waves ran over the sand and sank into it.",
    "The wind came from the west and smelled of salt.",
)
_COLOURS = ("red", "green", "blue", "white", "black", "brown", "yellow", "grey")
_THINGS = ("lamp", "door", "boat", "bird", "house", "stone", "coat", "cup", "tower", "field")


class NeedleSettings(Settings):
    """How many texts of which lengths."""

    lengths: tuple[int, ...] = ()
    """Tokens of the text that is searched; none: no needles."""
    samples: int = Field(default=20, ge=1)
    """Texts of each length; the needle's depth goes evenly from the first sentence to the last."""
    codes: int = Field(default=4, ge=1, le=80)
    """Codes in a text; one is asked for."""


def needles(settings: NeedleSettings, tokens: Callable[[str], int], seed: int) -> list[Item]:
    """The texts and questions, the same for the same vocabulary and seed; `tokens` counts those of a text."""
    return [
        _needle(length, number, settings, tokens, random.Random(f"{seed} {length} {number}"))
        for length in settings.lengths
        for number in range(settings.samples)
    ]


def _needle(
    length: int, number: int, settings: NeedleSettings, tokens: Callable[[str], int], draw: random.Random
) -> Item:
    names = draw.sample([f"{colour} {thing}" for colour in _COLOURS for thing in _THINGS], settings.codes)
    codes = draw.sample(range(10_000, 100_000), settings.codes)
    hidden = [f"The code of the {name} is {code}." for name, code in zip(names, codes, strict=True)]
    room = length - sum(tokens(f" {sentence}") for sentence in hidden)
    text: list[str] = []
    if room < 0:
        raise UserError(f"needle.lengths holds {length}, too few for {len(names)} codes; set it to {length - room}")
    while (room := room - tokens(f" {(sentence := draw.choice(_NOISE))}")) >= 0:
        text.append(sentence)
    for sentence in hidden[1:]:
        text.insert(draw.randint(0, len(text)), sentence)
    text.insert(round(number / max(settings.samples - 1, 1) * len(text)), hidden[0])
    prompt = f"{' '.join(text)}\n\nWhat is the code of the {names[0]}? The code of the {names[0]} is"
    return Item(f"{length}-{number}", prompt, str(codes[0]), "needle", f"{length}-{number}", f"{length} tokens")
