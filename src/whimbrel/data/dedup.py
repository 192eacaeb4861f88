"""Exact duplicates: two documents are one when their texts differ in nothing but letter case and white space."""

from __future__ import annotations

import unicodedata

from whimbrel.errors import need


def digest(text: str) -> str:
    """32 hexadecimal digits (xxh3, 128 bits), equal for exact duplicates; not against forgery. Of the text in NFC and
    lower case, its runs of white space made single blanks.
    """
    xxhash = need("xxhash", "data")
    normal = " ".join(unicodedata.normalize("NFC", text).lower().split())
    value: str = xxhash.xxh3_128_hexdigest(normal.encode("utf-8"))
    return value
