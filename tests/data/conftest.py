"""Small web archives, made by hand."""

import gzip
from collections.abc import Callable
from uuid import NAMESPACE_URL, uuid5

import pytest

Record = Callable[..., bytes]


def _record(
    url: str, body: bytes, kind: str = "text/html; charset=utf-8", status: str = "200 OK", extra: str = ""
) -> bytes:
    block = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{extra}\r\n".encode() + body
    head = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <{uuid5(NAMESPACE_URL, url).urn}>\r\n"
        f"WARC-Target-URI: {url}\r\nWARC-Date: 2026-11-21T12:00:00Z\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


@pytest.fixture
def record() -> Record:
    """A function that makes the bytes of one response record."""
    return _record


@pytest.fixture
def zipped() -> Callable[[list[bytes]], bytes]:
    """A function that packs records as crawlers do, one gzip member each."""
    return lambda records: b"".join(gzip.compress(one, mtime=0) for one in records)
