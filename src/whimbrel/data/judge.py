"""What becomes of one page: a pure function of the page and the settings, run in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from whimbrel.data import dedup, extract, language
from whimbrel.data.filters import Drop, Limits, check
from whimbrel.data.pages import Page


@dataclass(frozen=True)
class Judge:
    """Callable from Page to a row of `documents.SCHEMA` with the reason of its drop, if any, in `reason`."""

    languages: tuple[str, ...]
    min_language_score: float
    skip: tuple[str, ...]
    licenses: Mapping[str, str]
    limits: Limits

    def __call__(self, page: Page) -> dict[str, Any]:
        """Duplicates are not seen here: they need all pages."""
        if page.drop:
            return row(page, page.drop)
        body = extract.decode(page.body, page.charset)
        text = extract.main_content(body, self.skip) if page.html else extract.clean(body)
        if not text:
            return row(page, Drop("no_text", 0, "main content is empty"))
        code, score = language.detect(text)
        found = {
            "id": dedup.digest(text),
            "text": text,
            "language": code,
            "language_score": score,
            "license": page.license or self.license(page.url),
            "characters": len(text),
        }
        if self.languages and (code not in self.languages or score < self.min_language_score):
            wanted = f"{' or '.join(self.languages)} from {self.min_language_score:g}"
            return row(page, Drop("language", score, f"{code}, wanted {wanted}"), **found)
        return row(page, check(text, self.limits), **found)

    def license(self, url: str) -> str:
        """The licence of the longest prefix of the address that `licenses` names."""
        prefixes = [prefix for prefix in self.licenses if url.startswith(prefix)]
        return self.licenses[max(prefixes, key=len)] if prefixes else "unknown"


def row(page: Page, drop: Drop | None, **found: Any) -> dict[str, Any]:
    """A row of the parts; what is not known is absent."""
    reason = asdict(drop) if drop else {}
    return {"url": page.url, "source": page.source, "date": page.date, **found, **reason}
