"""Loss on text by position: does a model make use of what stands far back, and does it hold out to the end?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from whimbrel.config import Settings
from whimbrel.data import documents
from whimbrel.data.shards import TokenShards
from whimbrel.engine.score import score_pairs
from whimbrel.errors import UserError
from whimbrel.evaluate import statistics
from whimbrel.events import Report
from whimbrel.model.language import LanguageModel
from whimbrel.text import Tokenizer

Row = tuple[int, list[int], NDArray[np.bool_]]
"""(number of the document, token ids, which of them count as targets)."""


class LossSettings(Settings):
    """Which text, and how it is read."""

    path: str = ""
    """Under the input `text`: a token shard without `.bin`, a `.parquet` of documents, any other file a plain text."""
    length: int = Field(default=512, ge=2)
    """Tokens of a window; a document is cut into whole windows, its rest is left out."""
    windows: int = Field(default=64, ge=1)
    """Windows at most."""
    bins: int = Field(default=8, ge=1)
    """Parts of a window that figures are given for."""


def by_position(
    model: LanguageModel, tokenizer: Tokenizer, settings: LossSettings, place: Path, report: Report
) -> dict[str, Any]:
    """Mean loss (nats a token) and perplexity over windows, and the loss in each part of a window.

    The first token of a window is given, and no document is seen from another. Intervals are clustered by document,
    those of a single one by window.
    """
    length, found = settings.length, []
    cut = (
        (number, ids[start : start + length], learn[start + 1 : start + length])
        for number, ids, learn in texts(place / settings.path, tokenizer)
        for start in range(0, len(ids) - length + 1, length)
    )
    for number, ids, learn in islice(cut, settings.windows):
        (logprobs,) = score_pairs(model, [(ids[:1], ids[1:])], length)
        found.append((number, np.where(learn, -np.array(logprobs), np.nan)))
        report({"event": "progress", "done": len(found), "total": settings.windows, "unit": "windows", "text": "loss"})
    documents = len({number for number, _ in found})
    if documents == 1:
        found = list(enumerate(losses for _, losses in found))
    edges = np.linspace(0, length - 1, settings.bins + 1).round().astype(int).tolist()
    parts = {(low, high): _figure(found, low, high) for low, high in [(0, length - 1), *pairwise(edges)]}
    whole = parts.pop((0, length - 1))
    if whole is None:
        raise UserError(f"text.length is {length}, and no document with targets is as long; set text.length lower")
    return {
        "loss": whole,
        "perplexity": math.exp(whole["mean"]),
        "positions": [{"from": low + 1, "to": high, **part} for (low, high), part in parts.items() if part],
        "windows": len(found),
        "documents": documents,
        "tokens": int(sum(np.isfinite(losses).sum() for _, losses in found)),
    }


def _figure(found: Sequence[tuple[int, NDArray[np.float64]]], low: int, high: int) -> statistics.Figure | None:
    """Mean of targets low to high (from 0) of every window; None where none of them counts."""
    clusters: dict[int, list[float]] = {}
    for number, losses in found:
        clusters.setdefault(number, []).extend(losses[low:high][np.isfinite(losses[low:high])].tolist())
    full = [values for values in clusters.values() if values]
    return statistics.mean(full) if full else None


def texts(path: Path, tokenizer: Tokenizer) -> Iterator[Row]:
    """The documents of a shard, a parquet file or a plain text as tokens; of a shard with its mask."""
    if path.with_name(f"{path.name}.idx").exists():
        shards = TokenShards(path)
        for number, (start, stop) in enumerate(pairwise(shards.starts_D1.tolist())):
            yield number, shards.read(start, stop).tolist(), shards.learn(start, stop)
        return
    if not path.exists():
        raise UserError(f"text.path leads to {path}, which is not there; set it to a shard, a .parquet or a text")
    if path.is_dir() or path.suffix == ".parquet":
        read: Iterator[str] = (row["text"] for row in documents.read(path, ["text"]))
    else:
        read = iter([path.read_text(encoding="utf-8")])
    for number, text in enumerate(read):
        ids = tokenizer.encode(text, special=False, bos=tokenizer.adds_bos)
        yield number, ids, np.ones(len(ids), bool)
