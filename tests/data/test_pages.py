"""Pages out of files: archives whole and damaged, folders, JSON lines, text."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from whimbrel.data import pages
from whimbrel.data.pages import Damaged, Page
from whimbrel.errors import UserError

LIMIT = 100_000
Record = Callable[..., bytes]
Zipped = Callable[[list[bytes]], bytes]


def read(path: Path, limit: int = LIMIT) -> list[Page]:
    return [page for file in pages.find([path]) for page in pages.read(*file, limit)]


@pytest.fixture
def three(record: Record) -> list[bytes]:
    return [record(f"https://a.b/{i}", b"<p>body %d</p>" % i * (300 * i + 1)) for i in range(3)]


@pytest.mark.parametrize("form", ["plain", "members", "one member"])
def test_archives(tmp_path: Path, three: list[bytes], zipped: Zipped, form: str) -> None:
    whole = {"plain": b"".join(three), "members": zipped(three), "one member": gzip.compress(b"".join(three))}[form]
    path = tmp_path / ("crawl-1.warc" if form == "plain" else "crawl-1.warc.gz")
    path.write_bytes(whole)
    assert read(path) == [
        Page(
            f"https://a.b/{i}",
            "crawl-1",
            b"<p>body %d</p>" % i * (300 * i + 1),
            charset="utf-8",
            date="2026-11-21T12:00:00Z",
        )
        for i in range(3)
    ]


def test_what_is_no_page_is_handed_on_with_its_reason(tmp_path: Path, record: Record) -> None:
    request = b"WARC/1.0\r\nWARC-Type: request\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nhi\r\n\r\n"
    dns = record("dns:a.b", b"x").replace(b"application/http; msgtype=response", b"text/dns; x=012345678901234567890")
    records = [
        request,
        record("https://a.b/image", b"\x89PNG", kind="image/png"),
        record("https://a.b/gone", b"<p>no</p>", status="404 Not Found"),
        record("https://a.b/large", b"<p>" + b"x" * 5000),
        dns,
        record("https://a.b/page", b"<p>yes</p>"),
    ]
    (tmp_path / "a.warc").write_bytes(b"".join(records))
    found = read(tmp_path, limit=1000)
    reasons = [(page.drop.reason, page.drop.figure) if page.drop else None for page in found]
    assert reasons[:2] == [("media_type", None), ("http_status", 404)]
    assert reasons[2] is not None and reasons[2][0] == "page_bytes" and (reasons[2][1] or 0) > 5000
    assert reasons[3:] == [("not_http", None), None]
    assert [page.body for page in found] == [b"", b"", b"", b"", b"<p>yes</p>"]


def test_transfer_and_content_codings_are_undone(tmp_path: Path, record: Record) -> None:
    body = gzip.compress(b"<p>packed</p>")
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    coded = record("https://a.b/", chunks, extra="Transfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n")
    (tmp_path / "a.warc").write_bytes(coded)
    assert [page.body for page in read(tmp_path)] == [b"<p>packed</p>"]


@pytest.mark.parametrize("compressed", [False, True])
def test_every_cut_through_an_archive_is_noticed(
    tmp_path: Path, three: list[bytes], zipped: Zipped, compressed: bool
) -> None:
    pieces = [zipped([one]) for one in three] if compressed else three
    whole = b"".join(pieces)
    between = {0, len(pieces[0]), len(pieces[0]) + len(pieces[1])}  # nothing is missing there that could be noticed
    path = tmp_path / "a.warc"
    for cut in sorted({*range(1, len(whole), 37), *range(len(whole) - 6, len(whole))} - between):
        path.write_bytes(whole[:cut])
        with pytest.raises(Damaged, match=rf"a\.warc is damaged after \d pages \({cut} bytes.*set damaged to keep"):
            list(pages.read(path, "a", "a", LIMIT))


def test_what_lies_before_the_damage_is_kept(tmp_path: Path, record: Record, zipped: Zipped) -> None:
    records = [record(f"https://a.b/{i}", b"<p>%d" % i + bytes(range(33, 120)) * 900) for i in range(6)]
    path = tmp_path / "a.warc"
    path.write_bytes(b"".join(records)[:-100])
    got = []
    with pytest.raises(Damaged, match="after 5 pages"):
        for page in pages.read(path, "a", "a", LIMIT):
            got.append(page.url)
    assert got == [f"https://a.b/{i}" for i in range(5)]
    whole = zipped(records)
    path = tmp_path / "b.warc.gz"
    path.write_bytes(whole[: len(whole) // 2] + b"\x00" * 20 + whole[len(whole) // 2 + 20 :])
    with pytest.raises(Damaged, match="is damaged after"):
        list(pages.read(path, "b", "b", LIMIT))


@pytest.mark.parametrize("content", [b"", b"<html>no archive</html>" * 20])
def test_no_archive_at_all(tmp_path: Path, content: bytes) -> None:
    for name in ("a.warc", "a.warc.gz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Damaged, match="damaged after 0 pages"):
            list(pages.read(tmp_path / name, "a", "a", LIMIT))


def test_folders_json_lines_and_text(tmp_path: Path) -> None:
    (tmp_path / "web" / "sub").mkdir(parents=True)
    (tmp_path / "web" / "sub" / "b.html").write_bytes("<p>é</p>".encode("latin-1"))
    (tmp_path / "web" / "a.HTM").write_bytes(b"<p>a</p>")
    (tmp_path / "web" / "note.txt").write_text("plain", encoding="utf-8")
    (tmp_path / "web" / "image.png").write_bytes(b"not read")
    rows = [{"text": "one", "url": "https://a.b/1", "license": "MIT"}, {"text": "two \ud800", "extra": 1}]
    (tmp_path / "web" / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    assert read(tmp_path / "web") == [
        Page("a.HTM", "web", b"<p>a</p>"),
        Page("note.txt", "web", b"plain", html=False),
        Page("https://a.b/1", "web", b"one", html=False, license="MIT"),
        Page("rows.jsonl:3", "web", b"two ?", html=False),
        Page("sub/b.html", "web", b"<p>\xe9</p>"),
    ]
    assert [page.drop and page.drop.reason for page in read(tmp_path / "web", 4)] == [
        "page_bytes", "page_bytes", None, "page_bytes", "page_bytes",
    ]  # fmt: skip


@pytest.mark.parametrize("line", ['{"text": 5}', '{"url": "x"}', "[1]", "{", "5", "\xff"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: .*write each line as"):
        read(tmp_path)


def test_what_cannot_be_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pages is empty; set it to"):
        pages.find([])
    with pytest.raises(UserError, match=r"nowhere\.warc does not exist"):
        pages.find([tmp_path / "nowhere.warc"])
    with pytest.raises(UserError, match=r"holds no file that ends in \.warc\.gz"):
        pages.find([tmp_path])
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.pdf is of no known kind"):
        pages.find([tmp_path / "a.pdf"])
