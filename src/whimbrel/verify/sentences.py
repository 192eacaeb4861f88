"""Sentences and words of English as IFEval's rules count them: as NLTK's Punkt and Treebank decide, without their data.

Punkt (Kiss and Strunk 2006) has learned from a newspaper which words are abbreviations and which begin sentences; here
two short lists of our own stand for that. Ends of lines end no sentence, as there.
"""

from __future__ import annotations

import re
from itertools import pairwise

_ABBREVIATIONS = re.compile(
    r"(?:.*-)?(?:mrs?|ms|dr|prof|rev|hon|st|[sj]r|gen|col|capt|lt|sgt|gov|sen|rep|messrs|inc|corp|co|ltd|bros|vs|ave"
    r"|u\.[skn]|d\.c|ph\.d|m\.d|[ap]\.m|r\.i|j\.p|l\.a|n\.[yj]|a\.d|b\.c|jan|feb|aug|sept|oct|nov|dec)"
)
_OPENERS = re.compile(
    r"(?:the|an?|th(?:is|at|ese|ose|ere|en)|it|s?he|they|we|you|his|hers?|its|their|our|your|my|in|on|at|for|from|with"
    r"|without|by|wh(?:en|ile|ere|at|o|y)|how(?:ever)?|if|as|but|and|or|so|here|also|once|after|before|since|because"
    r"|although|some|many|most|all|each|every|both|another|other|such|one|two|finish|use|make|let|take|write|read|go"
    r"|get|keep|start|try|now|today|first|next|finally|please|remember|always|never|just)\b",
    re.IGNORECASE,
)
_FOLLOWING = frozenset("()\"'{}[]*:;@?!‘’“”«»")
_INNER = re.compile(r"[(\"`{\[:;&#*@)}\],]|--")


def count(text: str) -> int:
    """The number of sentences of a text; 0 for an empty one."""
    chunks = (re.sub(r"[\s\"')\]}‘’“”«»]+$", "", text) or text).split()
    ends = (_ends(chunk, following) for chunk, following in pairwise([*chunks, ""]))
    return bool(chunks) + sum(ends)


def _ends(chunk: str, following: str) -> bool:
    """Does a sentence end in this piece between white space? Its last sign that something can follow decides."""
    for place in range(len(chunk) - 1, -1, -1):
        if chunk[place] in ".?!":
            after = chunk[place + 1 : place + 2]
            if after in _FOLLOWING if after else following:
                return chunk[place] != "." or _stops(_INNER.split(chunk[: place + 1])[-1], after or following)
    return False


def _stops(word: str, following: str) -> bool:
    """Is the point at the end of a word that of a sentence, whose next word (or sign) would be `following`?"""
    kind = word[:-1].lower()
    following = following.lstrip("\"'([{*")
    start = following[:1]
    opens = start.isupper() and _OPENERS.match(following) is not None
    if word.endswith("..") or _ABBREVIATIONS.fullmatch(kind):
        return opens
    if re.fullmatch(r"[^\W\d_]", kind):
        return opens or not start.isalpha()
    return not (re.fullmatch(r"-?[.,]?\d[\d,.-]*", kind) and start.islower())


_SPLIT = re.compile(r"\.\.+|--|[–;@#$%&?!*\[\](){}<>\"“”„«»‘’`]+|[:,](?!\d)|\s+")
_JOINED = re.compile(r"(?i)\b(can(?=not)|(?:gi|le)m(?=me)|(?:go|wa)n(?=na)|got(?=ta)|d(?='ye)|more(?='n))('?\w+)\b")
_CONTRACTED = re.compile(r"(?i)(n't|'(?:s|m|d|ll|re|ve))\.?$|'$")


def words(text: str) -> list[str]:
    """The words of a text, contractions cut (`DON'T` is `DO` and `N'T`), in the manner of the Penn Treebank."""
    found = []
    for word in _SPLIT.split(_JOINED.sub(r"\1 \2", text)):
        cut = _CONTRACTED.search(word)
        found += [word[: cut.start()], cut[0]] if cut and cut.start() else [word]
    return [word for word in found if word]
