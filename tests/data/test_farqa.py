"""Samples whose answers stand far back: each fact stands once, before its question, and nothing else is made up."""

from __future__ import annotations

import random
import re
from pathlib import Path

from whimbrel.data import documents
from whimbrel.data.farqa import FarqaSettings, plant, run
from whimbrel.events import silent


def write(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    with documents.writing(folder / "documents.parquet", documents.DOCUMENTS) as file:
        for number, text in enumerate(texts):
            file.add({"id": f"{number:064}", "text": text, "license": ("MIT", "PSF-2.0")[number % 2]})
    return folder


def test_facts_stand_in_the_text_and_questions_at_the_end() -> None:
    facts = [("grey heron", "4 1 7"), ("red knot", "0 0 2")]
    text = plant(["one\ntwo", "three"], facts, random.Random(3))
    body, _, questions = text.partition("\nQuestion")
    assert [line for line in body.split("\n") if not line.startswith("The code")] == ["one", "two", "three"]
    for name, code in facts:
        assert body.count(f"The code of the {name} is {code}.") == 1
        assert f": What is the code of the {name}?\nAnswer: {code}" in questions


def test_samples_are_long_differ_and_follow_the_seed(tmp_path: Path) -> None:
    words = " ".join(f"word{number}\n" for number in range(60))
    source = write(tmp_path / "documents", [words, words.upper(), "short"])
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        settings = FarqaSettings(samples=20, characters=900, facts=2, seed=seed)
        figures = run(settings, {"documents": source}, tmp_path / name, silent)
        made.append(list(documents.read(tmp_path / name)))
        assert figures["characters"] == sum(len(row["text"]) for row in made[-1])
    assert made[0] == made[1] != made[2]
    assert len({row["id"] for row in made[0]}) == 20
    for row in made[0]:
        assert 900 <= row["characters"] <= 1200
        assert set(row["license"].split(" AND ")) <= {"MIT", "PSF-2.0"}
        asked = dict(re.findall(r"Question: What is the code of the (.+)\?\nAnswer: (.+)", row["text"]))
        assert asked == dict(re.findall(r"The code of the (.+) is (.+)\.", row["text"]))
        assert len(asked) == 2
    depths = [row["text"].index("The code") / row["characters"] for row in made[0]]
    assert min(depths) < 0.2 and max(depths) > 0.4
