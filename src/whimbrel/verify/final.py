"""Where an answer says that it is final: `\\boxed{…}`, `answer is …`, `answer: …`."""

from __future__ import annotations

import re

_SAID = re.compile(r"\banswer\b[*_ ]*(?:is|=|:)[*_ ]*:?[*_\s]*([^\n]+)", re.IGNORECASE)
_SPACES = re.compile(r"\\[,;!:> ]|~|\\(?:left|right|displaystyle|quad)\b")
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|textit)\s*\{([^{}]*)\}")
_SIGNS = {"\\%": "%", "{,}": ",", "\\$": "$", "^\\circ": "°", "^{\\circ}": "°"}
_AROUND = " \t\n*_`."


def boxed(text: str) -> list[str]:
    """What every `\\boxed{…}` holds, braces counted; an empty one and one that is never closed are left out."""
    found = []
    for match in re.finditer(r"\\f?box(?:ed)?\s*\{", text):
        depth = 1
        for place in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                found.append(text[match.end() : place])
                break
    return [inner for inner in found if inner.strip()]


def said(text: str) -> list[str]:
    """What follows each `answer is` or `answer:`, to the end of the sentence or line."""
    return [re.split(r"[.;!](?=\s|$)", rest)[0] for rest in _SAID.findall(text)]


def plain(text: str) -> str:
    """A text without what LaTeX and Markdown put around it."""
    for sign, meaning in _SIGNS.items():
        text = text.replace(sign, meaning)
    text = _WORDS.sub(r" \1", _SPACES.sub(" ", text)).strip(_AROUND)
    return text.removeprefix("\\(").removesuffix("\\)").strip(_AROUND + "$")
