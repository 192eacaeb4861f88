"""From a page's bytes to its prose: main content without navigation, code and formulas kept as they are written."""

from __future__ import annotations

from collections.abc import Sequence

from whimbrel.errors import need


def decode(body: bytes, charset: str | None) -> str:
    """Text of a body in the encoding that its server named, else in the one that its bytes suggest."""
    encoding = need("resiliparse.parse.encoding", "data")
    name = charset or encoding.detect_encoding(body, from_html_meta=True) or "utf-8"
    text: str = encoding.bytes_to_str(body, encoding.map_encoding_to_html5(name) or "utf-8")
    return text


def main_content(html: str, skip: Sequence[str] = ()) -> str:
    """The prose of an HTML page, with paragraphs, lists and preformatted code. skip: CSS selectors to leave out."""
    html2text = need("resiliparse.extract.html2text", "data")
    text: str = html2text.extract_plain_text(
        html, preserve_formatting=True, main_content=True, comments=False, skip_elements=list(skip)
    )
    return clean(text)


def clean(text: str) -> str:
    """Text without what no tokenizer or file can hold: NUL, lone surrogates, carriage returns, blanks at line ends."""
    text = text.replace("\x00", "").replace("\r\n", "\n").replace("\r", "\n")
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "\n".join(line.rstrip() for line in text.split("\n")).strip()
