"""The three stages from pages to tokens: `data`, `tokenizer`, `tokens`.

Each fills the folder `out`. What they write appears whole or not at all, depends on nothing but settings and inputs,
and is the same bytes after an interruption: `data` goes on behind its last finished part, the other two begin again.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from whimbrel.config import Bytes, Settings
from whimbrel.data import documents, language, pages, shards, workers
from whimbrel.data.filters import Drop, Limits
from whimbrel.data.judge import Judge, row
from whimbrel.errors import UserError, need
from whimbrel.events import Report
from whimbrel.text import Tokenizer
from whimbrel.text.tokenizer import check_size

PART = 256  # pages whose verdicts are kept at a time: what a kill can cost
# What a page must pass, in this order, and the reasons that drop it there. Every other reason is a limit of `filters`.
_STEPS = {
    "pages": ("page_bytes", "not_http", "http_status", "media_type"),
    "with_text": ("timeout", "crashed", "failed", "no_text"),
    "in_language": ("language",),
    "unique": ("duplicate",),
}
_BEFORE_DUPLICATES = {reason for step in ("pages", "with_text", "in_language") for reason in _STEPS[step]}


class DataSettings(Settings):
    """Stage `data`: pages to documents."""

    pages: tuple[Path, ...] = ()
    """Files (.warc, .warc.gz, .html, .jsonl, .txt) or folders of them, read in this order."""
    languages: tuple[str, ...] = ("en",)
    """ISO 639 codes of the languages to keep; an empty list keeps all."""
    min_language_score: float = Field(default=0.3, ge=0, le=1)
    skip: tuple[str, ...] = (".navheader", ".navfooter")
    """CSS selectors of what is no prose beside what is recognised anyway; these are DocBook's navigation."""
    licenses: dict[str, str] = Field(default_factory=dict)
    """Licence (SPDX) by the beginning of the address; the longest beginning wins."""
    limits: Limits = Limits()
    max_page_bytes: Bytes = 4 * 2**20
    deadline: float = Field(default=20, gt=0)
    """CPU seconds for one page; a page that takes longer is dropped as `timeout`."""
    memory: Bytes = 4 * 2**30
    """Addresses of one worker process; a page that needs more is dropped."""
    workers: int | None = Field(default=None, ge=1)
    """Processes; null is one a core. The result does not depend on it."""
    damaged: Literal["stop", "keep"] = "stop"
    """What to do at a damaged archive: stop, or keep what was read and go on with the next file."""


class TokenizerSettings(Settings):
    """Stage `tokenizer`: a vocabulary learned from documents."""

    vocab_size: int = 8192
    reserved: int = 64
    """Slots for special tokens at the beginning of the vocabulary."""
    min_frequency: int = 2

    @model_validator(mode="after")
    def _fits(self) -> TokenizerSettings:
        check_size(self.vocab_size, self.reserved)
        return self


class TokensSettings(Settings):
    """Stage `tokens`: documents to token shards."""

    heldout: float = Field(default=0.02, ge=0, lt=1)
    """Share of documents, chosen by their ids, that is kept from training."""


# ---------------------------------------------------------------------------------------------------------------- data


def run_data(settings: DataSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Write `documents.parquet` and `dropped.parquet`. An input `pages` is read before the setting of that name.

    Returns {"pages", "documents", "characters", "funnel", "dropped", "language_identifier"}. Raises UserError where
    nothing is left, and on a damaged archive.
    """
    _sweep(out)
    for module in ("pyarrow", "fastwarc", "resiliparse", "xxhash"):
        need(module, "data")
    files = pages.find([*([inputs["pages"]] if "pages" in inputs else []), *settings.pages])
    parts = _judge(settings, files, out / "parts", report)
    metrics = _merge(parts, out)
    if not metrics["documents"]:
        most = ", ".join(f"{reason} {number}" for reason, number in list(metrics["dropped"].items())[:3])
        raise UserError(
            f"none of {metrics['pages']} pages became a document (dropped: {most or 'nothing'}); "
            "loosen languages or limits, or name other pages"
        )
    shutil.rmtree(out / "parts")
    metrics["language_identifier"] = language.identifier()[0]
    report({"event": "metrics", "step": metrics["pages"], **metrics})
    return metrics


def _pages(settings: DataSettings, files: list[tuple[Path, str, str]], report: Report) -> Iterator[pages.Page]:
    for file, source, address in files:
        try:
            yield from pages.read(file, source, address, settings.max_page_bytes)
        except pages.Damaged as error:
            if settings.damaged == "stop":
                raise
            report({"event": "warning", "text": str(error)})


def _judge(settings: DataSettings, files: list[tuple[Path, str, str]], folder: Path, report: Report) -> list[Path]:
    """Verdicts on all pages, PART pages to a file. Files that are there already are kept, their pages passed over."""
    judge = Judge(
        settings.languages, settings.min_language_score, settings.skip, dict(settings.licenses), settings.limits
    )
    finished = next(n for n in count() if not (folder / f"{n:05}.parquet").exists())
    stream = islice(_pages(settings, files, report), finished * PART, None)
    cores = settings.workers or len(os.sched_getaffinity(0))
    verdicts = workers.each(judge, stream, workers=cores, deadline=settings.deadline, memory=settings.memory)
    parts = [folder / f"{n:05}.parquet" for n in range(finished)]
    done = finished * PART
    while rows := list(islice(_rows(verdicts), PART)):
        parts.append(folder / f"{len(parts):05}.parquet")
        with documents.writing(parts[-1], documents.DOCUMENTS | documents.DROPPED) as file:
            for verdict in rows:
                file.add(verdict)
        done += len(rows)
        report({"event": "progress", "done": done, "total": None, "unit": "pages", "text": "read and judged"})
    return parts


def _rows(verdicts: Iterator[tuple[pages.Page, Any]]) -> Iterator[dict[str, Any]]:
    for page, verdict in verdicts:
        lost = isinstance(verdict, workers.Lost)
        yield row(page, Drop(verdict.reason, None, verdict.detail)) if lost else verdict


def _merge(parts: list[Path], out: Path) -> dict[str, Any]:
    """One pass over all verdicts in order: the first of equal texts stays, the others are dropped as duplicates."""
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    characters = 0
    with (
        documents.writing(out / "documents.parquet", documents.DOCUMENTS) as kept,
        documents.writing(out / "dropped.parquet", documents.DROPPED) as gone,
    ):
        for verdict in (verdict for part in parts for verdict in documents.read(part)):
            if verdict["reason"] not in _BEFORE_DUPLICATES:
                if verdict["id"] in seen:
                    verdict |= {"reason": "duplicate", "figure": None, "detail": "of the text with this id"}
                seen.add(verdict["id"])
            if verdict["reason"] is None:
                kept.add(verdict)
                characters += verdict["characters"]
            else:
                gone.add(verdict)
                dropped[verdict["reason"]] += 1
    return {
        "pages": kept.count + gone.count,
        "documents": kept.count,
        "characters": characters,
        "funnel": _funnel(kept.count + gone.count, dropped),
        "dropped": dict(dropped.most_common()),
    }


def _funnel(read: int, dropped: Mapping[str, int]) -> dict[str, int]:
    """How many are left after each step, from `read` to `kept`."""
    left = {"read": read}
    for step, reasons in _STEPS.items():
        read -= sum(dropped.get(reason, 0) for reason in reasons)
        left[step] = read
    early = {reason for reasons in _STEPS.values() for reason in reasons}
    return left | {"kept": read - sum(number for reason, number in dropped.items() if reason not in early)}


def _sweep(out: Path) -> None:
    """Take away what a killed predecessor had half written."""
    for folder in (out, out / "parts"):
        for litter in folder.glob(".*.tmp"):
            litter.unlink()


# ------------------------------------------------------------------------------------------------- tokenizer and tokens


def run_tokenizer(settings: TokenizerSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Train a tokenizer on the input `documents`, or several of them, and save it as `out`, a tokenizer folder."""
    _sweep(out)
    folders = [folder for name, folder in sorted(inputs.items()) if name.partition(".")[0] == "documents"]
    texts = (document["text"] for folder in folders for document in documents.read(folder, ["text"]))
    report({"event": "log", "text": f"learning a vocabulary of {settings.vocab_size:,} entries"})
    tokenizer = Tokenizer.train(texts, settings.vocab_size, settings.reserved, settings.min_frequency)
    tokenizer.save(out)
    return {"vocab_size": tokenizer.vocab_size}


def run_tokens(settings: TokensSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Encode the input `documents` with the input `tokenizer` into the shards `out/train` and `out/heldout`.

    Special tokens that stand in a text are ordinary characters there; one end-of-text token follows each document.
    Returns {"vocab_size", "eos_id", "train": {"documents", "tokens", "bytes"}, "heldout": {…}}.
    """
    _sweep(out)
    tokenizer = Tokenizer.load(inputs["tokenizer"])
    if not tokenizer.eos_ids:
        raise UserError(
            f"the tokenizer in {inputs['tokenizer']} has no eos_token, which ends a document; name one that has"
        )
    held = [_is_heldout(entry["id"], settings.heldout) for entry in documents.read(inputs["documents"], ["id"])]
    if all(held) or (settings.heldout and not any(held)):
        raise UserError(
            f"heldout={settings.heldout:g} of {len(held)} documents leaves {held.count(False)} for training and "
            f"{held.count(True)} to hold out; set heldout to another share, or to 0"
        )
    metrics: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_ids[0]}
    for name, wanted in (("train", False), ("heldout", True)):
        if wanted in held:
            chosen = _encode(inputs["documents"], tokenizer, settings.heldout, wanted, held.count(wanted), report)
            metrics[name] = shards.write(out / name, chosen, tokenizer.vocab_size)
    return metrics


def _encode(
    folder: Path, tokenizer: Tokenizer, share: float, wanted: bool, total: int, report: Report
) -> Iterator[shards.Tokens]:
    """Documents of one side of the split as tokens."""
    rows = documents.read(folder, ["id", "url", "source", "license", "text"])
    chosen = (entry for entry in rows if _is_heldout(entry["id"], share) == wanted)
    done = 0
    while some := list(islice(chosen, documents.BATCH)):
        texts = [entry.pop("text") for entry in some]
        for entry, text, ids in zip(some, texts, tokenizer.encode_batch(texts, special=False), strict=True):
            yield shards.Tokens([*ids, tokenizer.eos_ids[0]], None, entry | {"bytes": len(text.encode())})
        done += len(some)
        report({"event": "progress", "done": done, "total": total, "unit": "documents", "text": "tokens"})


def _is_heldout(document: str, share: float) -> bool:
    """Decided by the id, which is a digest of the text: never by the order or number of documents."""
    return int(document[:16], 16) < share * 2**64
