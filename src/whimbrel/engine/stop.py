"""Stop strings over a growing text: nothing that may still become one is shown, and nothing from one onward."""

from __future__ import annotations


class Stops:
    """Feed text piece by piece; what comes out holds no stop string, wherever the pieces were cut."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.strings = strings
        self.hit: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """The part of the text that may be shown now. After a hit (`hit` names the string) nothing follows."""
        if self.hit is not None:
            return ""
        if not self.strings:
            return text
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self.strings if stop in text]
        if found:
            at, self.hit = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            self._held = ""
            return text[:at]
        keep = max(overlap(text, stop) for stop in self.strings)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back; the answer is at its end and no stop string can complete any more."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that is a true beginning of `word`."""
    for size in range(min(len(word) - 1, len(text)), 0, -1):
        if text.endswith(word[:size]):
            return size
    return 0
