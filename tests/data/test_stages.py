"""From pages to tokens: the funnel counts what was planted, and a kill leaves nothing behind but time."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from whimbrel.config import parse
from whimbrel.data import stages
from whimbrel.data.filters import Limits
from whimbrel.data.pack import Source, Windows
from whimbrel.data.shards import TokenShards
from whimbrel.data.stages import DataSettings, TokenizerSettings, TokensSettings, run_data, run_tokenizer, run_tokens
from whimbrel.errors import UserError
from whimbrel.events import silent
from whimbrel.text import Tokenizer

NOUNS = (
    "bird wader coast storm island heath winter summer flock water shore night journey weight wind season marsh boat "
    "count crab sand mud hole bill wing feather call ring north south weather gale harbour tide moon star rock grass "
    "nest egg chick parent fox gull hawk egret stilt plover snipe dunlin sail rope anchor net fish shell pearl foam"
)
WORDS = NOUNS.split()
GERMAN = "Die Vögel ziehen im Herbst über das Meer nach Süden und kehren im Frühling zu ihren Brutplätzen zurück. "
Record = Callable[..., bytes]
OFF = Limits(**dict.fromkeys(Limits.model_fields))


def prose(seed: int, sentences: int = 12) -> str:
    """English enough for every filter, different for every seed."""
    draw = random.Random(seed)
    gaps = ["The", "and the", "of that", "have seen", "to a", "in"]
    lines = [" ".join(f"{gap} {' '.join(draw.sample(WORDS, 2))}" for gap in gaps) + "." for _ in range(sentences)]
    return "\n".join(lines)


def page(text: str) -> bytes:
    paragraphs = "".join(f"<p>{line}</p>" for line in text.split("\n"))
    return f"<html><body><main><h1>On birds</h1>{paragraphs}</main></body></html>".encode()


@pytest.fixture
def crawl(tmp_path: Path, record: Record, zipped: Callable[[list[bytes]], bytes]) -> Path:
    """20 good pages, and one or two of everything that has to go."""
    good = [record(f"https://birds.example/{i}", page(prose(i))) for i in range(20)]
    bad = [
        record("https://birds.example/3?again", page(prose(3))),
        record("https://birds.example/4?shout", page(prose(4).upper())),
        record("https://birds.example/de", page(GERMAN * 8)),
        record("https://birds.example/de?again", page(GERMAN * 8)),
        record("https://birds.example/short", page("The bird and that coast have to be with wind.")),
        record("https://birds.example/short?again", page("The bird and that coast have to be with wind.")),
        record("https://birds.example/menu", page("\n".join(["The bird and the nest", "have to be with it"] * 30))),
        record("https://birds.example/photo", b"\xff\xd8\xff", kind="image/jpeg"),
        record("https://birds.example/gone", b"<p>gone</p>", status="404 Not Found"),
        record("https://birds.example/empty", b"<html><body></body></html>"),
        record("https://birds.example/huge", page(prose(99, 2000))),
    ]
    path = tmp_path / "crawl.warc.gz"
    path.write_bytes(zipped([*good[:10], *bad, *good[10:]]))
    return path


def settings(crawl: Path, **more: Any) -> DataSettings:
    licenses = {"https://birds.example/": "CC0-1.0", "https://birds.example/7": "MIT"}
    return DataSettings(pages=(crawl,), licenses=licenses, max_page_bytes=100_000, workers=1, **more)


def make(out: Path, what: DataSettings, report: Callable[[dict[str, Any]], None] = silent) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    return run_data(what, {}, out, report)


def rows(path: Path) -> list[dict[str, Any]]:
    return parquet.read_table(path).to_pylist()


def test_the_funnel_counts_what_was_planted(tmp_path: Path, crawl: Path) -> None:
    events: list[dict[str, Any]] = []
    metrics = make(tmp_path / "out", settings(crawl), events.append)
    assert metrics["funnel"] == {
        "read": 31, "pages": 28, "with_text": 27, "in_language": 25, "unique": 22, "kept": 20,
    }  # fmt: skip
    assert metrics["dropped"] == {
        "duplicate": 3, "language": 2, "words": 1, "unique_lines": 1, "media_type": 1, "http_status": 1,
        "no_text": 1, "page_bytes": 1,
    }  # fmt: skip
    assert (metrics["pages"], metrics["documents"]) == (31, 20)
    kept = rows(tmp_path / "out" / "documents.parquet")
    assert [row["url"] for row in kept] == [f"https://birds.example/{i}" for i in range(20)]
    assert kept[7] == {
        "id": kept[7]["id"], "text": "On birds\n\n" + prose(7).replace("\n", "\n\n"), "source": "crawl",
        "url": "https://birds.example/7", "date": "2026-11-21T12:00:00Z", "language": "en",
        "language_score": pytest.approx(0.9, abs=0.1), "license": "MIT", "quality": None,
        "characters": len(kept[7]["text"]),
    }  # fmt: skip
    assert kept[8]["license"] == "CC0-1.0" and metrics["characters"] == sum(len(row["text"]) for row in kept)
    gone = {
        row["url"].removeprefix("https://birds.example/"): row for row in rows(tmp_path / "out" / "dropped.parquet")
    }
    assert gone["3?again"]["reason"] == "duplicate" and gone["3?again"]["id"] == kept[3]["id"]
    assert gone["4?shout"]["reason"] == "duplicate" and gone["4?shout"]["id"] == kept[4]["id"]
    assert (
        gone["de"]["language"] == "de"
        and gone["de"]["figure"] > 0.9
        and gone["de"]["detail"] == "de, wanted en from 0.3"
    )
    assert gone["short?again"]["reason"] == "duplicate" and gone["short?again"]["id"] == gone["short"]["id"]
    assert gone["short"]["figure"] == 12 and gone["short"]["detail"] == "min 50"
    assert gone["gone"]["figure"] == 404 and gone["huge"]["figure"] > 100_000
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["documents.parquet", "dropped.parquet"]
    progress = [event for event in events if event["event"] == "progress"]
    assert progress[-1]["done"] == 31 and progress[-1]["unit"] == "pages"


def test_every_setting_arrives(tmp_path: Path, crawl: Path) -> None:
    languages = make(tmp_path / "a", settings(crawl, languages=["de"], limits=OFF))
    assert (languages["documents"], languages["dropped"]["language"]) == (1, 25)
    assert "language" not in make(tmp_path / "b", settings(crawl, languages=[]))["dropped"]
    scores = sorted(row["language_score"] for row in rows(tmp_path / "b" / "documents.parquet"))
    strict = make(tmp_path / "c", settings(crawl, languages=["en", "de"], min_language_score=scores[-3] - 1e-6))
    assert strict["documents"] == 3
    loose = make(tmp_path / "d", settings(crawl, limits=Limits(min_words=None, max_words=20)))
    assert loose["dropped"]["words"] == 21 and loose["documents"] == 1
    (tmp_path / "one.txt").write_text(prose(1), encoding="utf-8")
    for change, reason in (({"deadline": 1e-6}, "timeout"), ({"memory": 2**20}, "crashed|failed")):
        with pytest.raises(UserError, match=rf"none of 1 pages became a document \(dropped: ({reason}) 1"):
            make(tmp_path / reason, settings(tmp_path / "one.txt").model_copy(update=change))
    small = make(tmp_path / "f", settings(crawl).model_copy(update={"max_page_bytes": 10**6}))
    assert "page_bytes" not in small["dropped"]
    skipped = make(tmp_path / "g", settings(crawl, skip=["h1"]))
    assert (
        not rows(tmp_path / "g" / "documents.parquet")[0]["text"].startswith("On birds") and skipped["documents"] == 20
    )
    with pytest.raises(UserError, match=r"unknown setting limits\.min_word; did you mean limits\.min_words"):
        parse(DataSettings, {"limits": {"min_word": 3}})


def test_the_same_bytes_with_one_and_with_two_workers(
    tmp_path: Path, crawl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "one", settings(crawl))
    monkeypatch.setattr(stages, "PART", 7)
    make(tmp_path / "two", settings(crawl).model_copy(update={"workers": 2}))
    for name in ("documents.parquet", "dropped.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_damaged_archive_stops_or_is_kept(tmp_path: Path, crawl: Path) -> None:
    whole = crawl.read_bytes()
    crawl.write_bytes(whole[: len(whole) * 3 // 4])
    (tmp_path / "more.txt").write_text(prose(500), encoding="utf-8")
    both = settings(crawl).model_copy(update={"pages": (crawl, tmp_path / "more.txt")})
    with pytest.raises(UserError, match=r"crawl\.warc\.gz is damaged after \d+ pages"):
        make(tmp_path / "out", both)
    events: list[dict[str, Any]] = []
    metrics = make(tmp_path / "out", both.model_copy(update={"damaged": "keep"}), events.append)
    assert 5 < metrics["pages"] < 31 and "damaged after" in next(e["text"] for e in events if e["event"] == "warning")
    assert rows(tmp_path / "out" / "documents.parquet")[-1]["text"] == prose(500)


def test_nothing_left_says_why(tmp_path: Path, crawl: Path) -> None:
    with pytest.raises(
        UserError, match=r"none of 31 pages became a document \(dropped: language 27, .*loosen languages"
    ):
        make(tmp_path / "out", settings(crawl, languages=["is"]))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of 0 pages became a document \(dropped: nothing\)"):
        make(tmp_path / "none", settings(tmp_path / "empty.jsonl"))


PROGRAM = """
    import json, sys
    from pathlib import Path
    from whimbrel.data import stages
    if __name__ == "__main__":
        stages.PART = 8
        {limit}
        out = Path(sys.argv[2])
        out.mkdir(exist_ok=True)
        stages.run_data(stages.DataSettings(pages=(Path(sys.argv[1]),), workers=1), {{}}, out, lambda event: None)
"""


def start(tmp_path: Path, corpus: Path, out: Path, limit: str = "") -> subprocess.Popen[bytes]:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM.format(limit=limit)), encoding="utf-8")
    return subprocess.Popen([sys.executable, str(program), str(corpus), str(out)], stderr=subprocess.PIPE)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(tmp_path: Path, number: int) -> None:
    corpus = tmp_path / "web"
    corpus.mkdir()
    for i in range(60):
        (corpus / f"{i:03}.html").write_bytes(page(prose(i % 50)))
    killed = start(tmp_path, corpus, tmp_path / "killed")
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "parts" / "00001.parquet").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(number)
    _, complaint = killed.communicate()
    assert killed.returncode != 0, complaint
    before = bytes_of(tmp_path / "killed")
    assert "parts/00001.parquet" in before and "documents.parquet" not in before
    (tmp_path / "killed" / ".documents.parquet.1.tmp").write_bytes(b"half a file")
    what = DataSettings(pages=(corpus,), workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "PART", 8)
        metrics = make(tmp_path / "killed", what)
    assert make(tmp_path / "whole", what) == metrics and metrics["dropped"] == {"duplicate": 10}
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    corpus = tmp_path / "many.jsonl"
    corpus.write_text("".join(f'{{"text": {prose(i)!r}}}\n'.replace("'", '"') for i in range(20)), encoding="utf-8")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    full = start(tmp_path, corpus, tmp_path / "out", limit)
    _, complaint = full.communicate()
    assert full.returncode == 1 and b"File too large" in complaint
    assert not (tmp_path / "out" / "documents.parquet").exists()
    what = settings(corpus)
    make(tmp_path / "whole", what)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "PART", 8)
        make(tmp_path / "out", what)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def prepare(tmp_path: Path, crawl: Path) -> dict[str, Path]:
    inputs = {"documents": tmp_path / "documents", "tokenizer": tmp_path / "tokenizer"}
    make(inputs["documents"], settings(crawl))
    inputs["tokenizer"].mkdir()
    metrics = run_tokenizer(TokenizerSettings(vocab_size=500), inputs, inputs["tokenizer"], silent)
    assert metrics == {"vocab_size": 500}
    return inputs


def test_a_vocabulary_that_is_too_small_is_refused_before_anything_runs() -> None:
    with pytest.raises(UserError, match=r"vocab_size=3 is too small .* set vocab_size to 320 or more"):
        parse(TokenizerSettings, {"vocab_size": 3})


def test_documents_to_tokens_and_back(tmp_path: Path, crawl: Path) -> None:
    inputs = prepare(tmp_path, crawl)
    metrics = run_tokens(TokensSettings(heldout=0.3), inputs, tmp_path / "tokens", silent)
    tokenizer = Tokenizer.load(inputs["tokenizer"])
    documents = {row["id"]: row for row in rows(inputs["documents"] / "documents.parquet")}
    seen = []
    for name in ("train", "heldout"):
        shard = TokenShards(tmp_path / "tokens" / name)
        lineage = rows(tmp_path / "tokens" / f"{name}.docs.parquet")
        assert (
            metrics[name] == {"documents": shard.documents, "tokens": shard.tokens}
            and shard.learn(0, shard.tokens).all()
        )
        for number, row in enumerate(lineage):
            ids = shard.document(number).tolist()
            assert ids[-1] == tokenizer.eos_ids[0] and tokenizer.eos_ids[0] not in ids[:-1]
            assert tokenizer.decode(ids[:-1]) == documents[row["id"]]["text"]
            assert (row["offset"], row["length"]) == (shard.starts_D1[number], len(ids))
            assert row["url"] == documents[row["id"]]["url"] and row["bytes"] == len(
                documents[row["id"]]["text"].encode()
            )
            assert (int(row["id"][:16], 16) / 2**64 < 0.3) == (name == "heldout")
            seen.append(row["id"])
    assert sorted(seen) == sorted(documents) and metrics["vocab_size"] == 500
    batch = Source(Windows(TokenShards(tmp_path / "tokens" / "train"), 64, seed=1), 2).batch(0)
    assert len(batch.tokens_T) == 128 and sum(batch.lengths) == 128
    first = bytes_of(tmp_path / "tokens")
    (tmp_path / "tokens" / ".train.bin.1.tmp").write_bytes(b"left by a kill")
    run_tokens(TokensSettings(heldout=0.3), inputs, tmp_path / "tokens", silent)
    assert bytes_of(tmp_path / "tokens") == first
    again = tmp_path / "again"
    again.mkdir()
    run_tokenizer(TokenizerSettings(vocab_size=500), inputs, again, silent)
    assert bytes_of(again) == bytes_of(inputs["tokenizer"])


def test_special_tokens_in_a_page_are_text(tmp_path: Path, crawl: Path) -> None:
    corpus = tmp_path / "sly.jsonl"
    corpus.write_text(
        '{"text": "The end </s> and <SPECIAL_12> have to be read as that and with the rest of it."}\n' * 1, "utf-8"
    )
    inputs = prepare(tmp_path, crawl)
    inputs["documents"] = tmp_path / "sly"
    make(inputs["documents"], settings(corpus, limits=Limits(min_words=None)))
    run_tokens(TokensSettings(heldout=0), inputs, tmp_path / "tokens", silent)
    tokenizer = Tokenizer.load(inputs["tokenizer"])
    ids = TokenShards(tmp_path / "tokens" / "train").document(0).tolist()
    assert ids.count(tokenizer.eos_ids[0]) == 1 and "</s> and <SPECIAL_12>" in tokenizer.decode(ids[:-1])
    assert min(ids[:-1]) >= 64 and not (tmp_path / "tokens" / "heldout.bin").exists()


def test_a_split_that_cannot_be_made_says_so(tmp_path: Path, crawl: Path) -> None:
    inputs = prepare(tmp_path, crawl)
    for share in (1e-9, 0.9999999):
        with pytest.raises(
            UserError, match=r"heldout=.* of 20 documents leaves .* set heldout to another share, or to 0"
        ):
            run_tokens(TokensSettings(heldout=share), inputs, tmp_path / "tokens", silent)
    with pytest.raises(UserError, match=r"documents\.parquet does not exist; name the folder"):
        run_tokens(TokensSettings(), inputs | {"documents": tmp_path}, tmp_path / "tokens", silent)
    (tmp_path / "documents.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"cannot be read as documents"):
        run_tokens(TokensSettings(), inputs | {"documents": tmp_path}, tmp_path / "tokens", silent)


@pytest.mark.slow
def test_the_pages_of_the_repository(tmp_path: Path) -> None:
    """Real pages under real licences: most become documents, none in another language, every page is accounted for."""
    archive = Path(__file__).parents[2] / "data" / "pages" / "whimbrel-pages.warc.gz"
    metrics = make(tmp_path, DataSettings(pages=(archive,), workers=min(2, os.cpu_count() or 1)))
    assert metrics["pages"] == 844 and 480 < metrics["documents"] < 620 and metrics["characters"] > 4_000_000
    assert 60 < metrics["dropped"]["language"] < 100 and metrics["dropped"]["duplicate"] >= 4
    kept = rows(tmp_path / "documents.parquet")
    assert len({row["id"] for row in kept}) == len(kept) == metrics["documents"]
    assert {row["language"] for row in kept} == {"en"} and {row["license"] for row in kept} == {"unknown"}
    texts = {row["url"]: row["text"] for row in kept}
    assert "class Dog:\n\n    kind = 'canine'  " in texts["https://docs.python.org/3.11/tutorial/classes.html"]
    assert (
        r"\[x^2 \frac{d^2 y}{dx^2} + x \frac{dy}{dx}"
        in texts["https://docs.scipy.org/doc/scipy-1.10.1/tutorial/special.html"]
    )
    assert len(rows(tmp_path / "dropped.parquet")) == 844 - len(kept)
