"""Raw pages out of files: web archives, folders of HTML, JSON lines, plain text.

A page that is no page (an image, an error message, more bytes than allowed) is handed on as well, with the reason why
it goes, so that everything that was read can be accounted for.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from whimbrel.data.filters import Drop
from whimbrel.errors import UserError, need

SUFFIXES = (".warc.gz", ".warc", ".html", ".htm", ".jsonl", ".txt")


@dataclass(frozen=True)
class Page:
    """One thing that was read. `body` is HTML, or text already where `html` is False."""

    url: str
    source: str
    body: bytes
    html: bool = True
    charset: str | None = None
    date: str = ""
    license: str = ""
    drop: Drop | None = None


class Damaged(UserError):
    """An archive that ends early or holds something else. Says what could be read before."""


def find(paths: Sequence[Path]) -> list[tuple[Path, str, str]]:
    """Files that can be read, in a fixed order: (file, source, address inside what was named). Folders are walked."""
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.name.lower().endswith(SUFFIXES) and file.is_file())
            found += [(file, path.name, file.relative_to(path).as_posix()) for file in inside]
            if not inside:
                raise UserError(f"pages: the folder {path} holds no file that ends in {', '.join(SUFFIXES)}")
        elif not path.exists():
            raise UserError(f"pages: {path} does not exist; name a file or folder that does")
        elif not path.name.lower().endswith(SUFFIXES):
            raise UserError(f"pages: {path} is of no known kind; name files that end in {', '.join(SUFFIXES)}")
        else:
            found.append((path, path.name.partition(".")[0], path.name))
    if not found:
        raise UserError("pages is empty; set it to a list of files or folders, such as [pages.warc.gz]")
    return found


def read(file: Path, source: str, address: str, max_bytes: int) -> Iterator[Page]:
    """Every page of a file. Raises Damaged, after what could be read, on an archive that is cut short or broken."""
    name = file.name.lower()
    if name.endswith((".warc", ".warc.gz")):
        yield from _warc(file, source, max_bytes)
    elif name.endswith(".jsonl"):
        yield from _json_lines(file, source, address, max_bytes)
    else:
        size = file.stat().st_size
        body = b"" if size > max_bytes else file.read_bytes()
        yield Page(address, source, body, html=not name.endswith(".txt"), drop=_too_large(size, max_bytes))


def _too_large(size: int, max_bytes: int) -> Drop | None:
    return Drop("page_bytes", size, f"max {max_bytes}") if size > max_bytes else None


def _json_lines(file: Path, source: str, address: str, max_bytes: int) -> Iterator[Page]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                body = row["text"].encode("utf-8", "replace")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{file}, line {number}: {type(error).__name__}: {error}; "
                    'write each line as {"text": "…", "url": "…"}'
                ) from None
            url, licence = str(row.get("url") or f"{address}:{number}"), str(row.get("license") or "")
            drop = _too_large(len(body), max_bytes)
            yield Page(url, source, b"" if drop else body, html=False, license=licence, drop=drop)


def _warc(file: Path, source: str, max_bytes: int) -> Iterator[Page]:
    """Responses of an archive. Python's own gzip in between tells an archive that was cut short from one that ends."""
    warc = need("fastwarc.warc", "data")
    pages = 0
    with open(file, "rb") as raw:
        stream: BinaryIO = gzip.GzipFile(fileobj=raw) if _is_gzip(raw) else raw  # type: ignore[assignment]
        raw.seek(0)
        records = iter(warc.ArchiveIterator(stream, parse_http=False, record_types=warc.response))
        while True:
            try:
                record = next(records, None)
                if record is None:
                    _check_end(raw)
                    return
                page = _page(record, source, max_bytes)
            except (EOFError, OSError, zlib.error, ValueError) as error:
                raise Damaged(
                    f"{file} is damaged after {pages} pages ({file.stat().st_size} bytes; {error}); "
                    "get the file again, or set damaged to keep to go on with what was read"
                ) from None
            pages += 1
            yield page


def _check_end(raw: BinaryIO) -> None:
    """A record ends in two line ends; an archive that is not compressed can be cut where the reader does not mind."""
    size = raw.seek(0, 2)
    raw.seek(max(size - 4, 0))
    if raw.read(4) != b"\r\n\r\n" and not _is_gzip(raw):
        raise EOFError("the last record has no end")


def _is_gzip(raw: BinaryIO) -> bool:
    raw.seek(0)
    return raw.read(2) == b"\x1f\x8b"


def _page(record: Any, source: str, max_bytes: int) -> Page:
    headers, size = record.headers, record.content_length
    url, date = headers.get("WARC-Target-URI", "").strip("<>"), headers.get("WARC-Date", "")
    if drop := _too_large(size, max_bytes):
        return Page(url, source, b"", date=date, drop=drop)
    block = record.reader.read()
    if len(block) != size:
        raise EOFError(f"the page {url} ends after {len(block)} of {size} bytes")
    if headers.get("Content-Type", "").partition(";")[0].strip() != "application/http":
        return Page(url, source, b"", date=date, drop=Drop("not_http", None, headers.get("Content-Type", "")))
    record.set_bytes_content(block)
    record.parse_http(auto_decode="all")
    status, kind = record.http_headers.status_code, (record.http_content_type or "").lower()
    if status != 200:
        return Page(url, source, b"", date=date, drop=Drop("http_status", status, "only 200"))
    if kind not in ("text/html", "application/xhtml+xml"):
        return Page(url, source, b"", date=date, drop=Drop("media_type", None, kind))
    return Page(url, source, record.reader.read(), charset=record.http_charset, date=date)
