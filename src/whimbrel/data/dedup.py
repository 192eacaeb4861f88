"""Exact duplicates: two documents are one when their texts differ in nothing but letter case and white space."""

from __future__ import annotations

import unicodedata

from whimbrel.errors import need


def normal_form(text: str) -> str:
    """The text in Unicode's NFC, in lower case, its runs of white space made single blanks."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def digest(text: str) -> str:
    """32 hexadecimal digits (xxh3, 128 bits) of the normal form: equal for exact duplicates. Not against forgery."""
    xxhash = need("xxhash", "data")
    value: str = xxhash.xxh3_128_hexdigest(normal_form(text).encode("utf-8"))
    return value
