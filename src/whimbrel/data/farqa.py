"""The stage `farqa`: long documents that end in questions whose answers stand far back, for long-context training.

Nemotron Nano 2 extends its context with such data (arXiv 2508.14444, section 2.6), where a model writes the questions
about the document. Here a rule plants the facts that are asked for, so that every answer is known and its distance too:

    passage … The code of the grey heron is 4 1 7. … passage …
    Question: What is the code of the grey heron?
    Answer: 4 1 7

OUT/documents.parquet     as the stage `data` writes it; `url` of a sample lists the documents it is made of
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from whimbrel.config import Settings
from whimbrel.data import documents
from whimbrel.errors import UserError
from whimbrel.events import Report

KINDS = (
    "grey",
    "white",
    "black",
    "red",
    "brown",
    "small",
    "great",
    "northern",
    "southern",
    "common",
    "crested",
    "wood",
)
BIRDS = ("heron", "plover", "curlew", "godwit", "tern", "gull", "stilt", "sandpiper", "avocet", "snipe", "knot", "ruff")


class FarqaSettings(Settings):
    """Stage `farqa`: how many samples of which length."""

    samples: int = Field(default=1000, ge=1)
    characters: int = Field(default=4000, ge=200)
    """Length of a sample, about: passages of documents are added until it is reached."""
    facts: int = Field(default=2, ge=1, le=16)
    """Facts planted in a sample, each at a place of its own and each asked for at the end."""
    digits: int = Field(default=3, ge=1, le=12)
    """Digits of a code."""
    seed: int = Field(default=0, ge=0)


def plant(passages: Sequence[str], facts: Sequence[tuple[str, str]], draw: random.Random) -> str:
    """The passages with a sentence for each fact (name, code) between their lines, then a question for each fact.

    Places are uniform over the lines; the questions come in an order of their own.
    """
    lines = [line for passage in passages for line in passage.split("\n")]
    places = sorted((draw.randrange(len(lines)) for _ in facts), reverse=True)
    for place, (name, code) in zip(places, facts, strict=True):
        lines.insert(place, f"The code of the {name} is {code}.")
    asked = draw.sample(list(facts), len(facts))
    questions = [f"Question: What is the code of the {name}?\nAnswer: {code}" for name, code in asked]
    return "\n".join([*lines, *questions])


def run(settings: FarqaSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Make samples from the input `documents`; returns how many, and their characters."""
    texts = list(documents.read(inputs["documents"], ["id", "text", "license"]))
    if not texts:
        raise UserError(f"{inputs['documents']} holds no document; name one that does")
    characters = 0
    with documents.writing(out / "documents.parquet", documents.DOCUMENTS) as file:
        for row in _samples(settings, texts):
            file.add(row)
            characters += row["characters"]
    report({"event": "log", "text": f"{settings.samples:,} samples of {characters // settings.samples:,} characters"})
    return {"samples": settings.samples, "characters": characters}


def _samples(settings: FarqaSettings, texts: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for number in range(settings.samples):
        draw = random.Random(f"{settings.seed} {number}")
        used: list[Mapping[str, Any]] = []
        passages: list[str] = []
        room = settings.characters
        while room > 0:
            document = draw.choice(texts)
            start = draw.randrange(max(1, len(document["text"]) - room))
            passages.append(document["text"][start : start + room])
            used.append(document)
            room -= len(passages[-1])
        names = draw.sample([f"{kind} {bird}" for kind in KINDS for bird in BIRDS], settings.facts)
        facts = [(name, " ".join(draw.choices("0123456789", k=settings.digits))) for name in names]
        text = plant(passages, facts, draw)
        yield {
            "id": hashlib.sha256(text.encode()).hexdigest(),
            "text": text,
            "source": "farqa",
            "url": " ".join(document["id"] for document in used),
            "license": " AND ".join(sorted({document["license"] or "unknown" for document in used})),
            "language": "en",
            "characters": len(text),
        }
