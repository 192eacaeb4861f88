"""`report.html`: one page about a run, made of its manifests and what its stages wrote. It holds no number of its own.

The page is one file: style, curves and script are inside it, and it asks the network for nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from whimbrel import config
from whimbrel.files import atomic_write
from whimbrel.pipeline import charts, life
from whimbrel.pipeline.claims import held
from whimbrel.pipeline.console import duration, figure
from whimbrel.pipeline.recipe import Recipe
from whimbrel.units import format_bytes, format_count

Manifest = Mapping[str, Any]
WIDE, NARROW = 860, 344
ABOUT = {
    "data": "pages to documents",
    "tokenizer": "documents to a vocabulary",
    "tokens": "documents to token shards",
    "farqa": "long documents with far answers",
    "pretrain": "tokens to a model",
    "compress": "a smaller model cut out",
    "distill": "it learns from its teacher",
    "evaluate": "problems answered and scored",
    "tasks": "problems with solutions and a verifier",
    "sft": "it learns to think and to answer",
    "chat-tokens": "conversations to token shards",
    "pairs": "answers drawn and ranked",
    "reward": "a model that rates",
    "dpo": "it prefers the better answer",
    "grpo": "it is rewarded for right answers",
    "merge": "the best point between two models",
    "quantize": "few bits",
    "speed": "tokens a second, beside a dense twin",
    "sample": "the model writes",
}
SHOWN = {
    "data": ("pages", "documents", "characters"),
    "tokenizer": ("vocab size",),
    "tokens": ("train tokens", "heldout tokens"),
    "pretrain": ("step", "tokens", "loss", "validation loss", "threads"),
    "compress": ("parameters", "parent loss", "cut loss"),
    "distill": ("step", "tokens", "validation loss", "teacher loss"),
    "sample": ("samples", "tokens"),
    "sft": ("step", "tokens", "loss", "validation loss"),
    "dpo": ("pairs", "step", "preference", "accuracy"),
    "reward": ("step", "error", "agreement correctness"),
    "grpo": ("step", "reward", "drift"),
    "merge": ("alpha", "mean"),
    "quantize": ("bits per weight", "weights bytes"),
    "evaluate": ("text loss", "sums curve half"),
    "speed": ("twin parameters",),
}
"""Figures of a stage's row; a stage that is not here shows all it has."""
REASONS = {
    "alphabetic": "words without letters",
    "crashed": "broke the reader",
    "duplicate": "a text seen before",
    "language": "another language",
    "mean_word": "odd length of words",
    "media_type": "not a page of text",
    "no_text": "no text in it",
    "page_bytes": "too large",
    "repeated_10gram": "repeats of ten words",
    "repeated_5gram": "repeats of five words",
    "signs": "mostly signs",
    "stop_words": "hardly a sentence",
    "top_2gram": "one pair repeated",
    "top_3gram": "one triple repeated",
    "top_4gram": "one phrase repeated",
    "unique_lines": "repeated lines",
    "words": "too short or too long",
}
"""Reasons of the stage `data` in words; one that is not here is shown as it is written."""


def write(folder: Path, recipe: Recipe, made: Sequence[Manifest]) -> Path:
    """Write the report of finished stages, in the order they ran; returns its path."""
    kinds = {manifest["stage"]: manifest for manifest in reversed(made)}  # the first of each kind
    page = {
        "name": recipe.name,
        "about": recipe.about,
        "story": story(kinds),
        "headline": headline(kinds, made),
        "training": training(folder, kinds["pretrain"]) if "pretrain" in kinds else None,
        "funnel": funnel(kinds["data"]["metrics"]) if "data" in kinds else None,
        "samples": samples(folder, kinds["sample"]) if "sample" in kinds else None,
        "claims": held(recipe.claims, {manifest["name"]: manifest for manifest in made}),
        "life": life.gather(folder, made),
        "stages": table(made),
        "total": sum(manifest["wall_seconds"] for manifest in made),
        "most": max(manifest["peak_memory_bytes"] for manifest in made),
        "lineage": lineage(made),
        "configs": [(manifest["name"], config.to_yaml(manifest["config"])) for manifest in made],
        "machine": machine(made[-1]),
        "finished": max(manifest["finished"] for manifest in made),
        "commit": made[-1]["commit"],
    }
    shelf = Environment(loader=PackageLoader("whimbrel.pipeline"), autoescape=True, undefined=StrictUndefined)
    shelf.globals["exp"] = math.exp
    shelf.filters |= {"figure": figure, "bytes": format_bytes, "count": format_count, "duration": duration}
    shelf.filters["points"] = lambda share: f"{100 * share:+.1f}".replace("-", "\u2212")
    html = shelf.get_template("report.html").render(page)
    with atomic_write(folder / "report.html") as file:
        file.write(html)
    return folder / "report.html"


def story(kinds: Mapping[str, Manifest]) -> list[str]:
    """The run in a few sentences."""
    told = []
    if "data" in kinds and "tokens" in kinds:
        pages, tokens = kinds["data"]["metrics"], kinds["tokens"]["metrics"]
        held = f", and {format_count(tokens['heldout']['tokens'])} to be tested on" if "heldout" in tokens else ""
        told.append(
            f"{pages['pages']:,} pages became {pages['documents']:,} documents: "
            f"{format_count(tokens['train']['tokens'])} tokens to learn from{held}."
        )
    if "pretrain" in kinds:
        seen, shape = kinds["pretrain"]["metrics"], kinds["pretrain"]["probe"]["shape"]
        told.append(
            f"A model of {len(shape['pattern'])} layers, {shape['hidden_size']} wide, read "
            f"{format_count(seen['tokens'])} tokens at {seen['tokens'] / seen['seconds']:,.0f} a second."
        )
    return told


def headline(kinds: Mapping[str, Manifest], made: Sequence[Manifest]) -> list[dict[str, str]]:
    """The four figures that matter, each with a note."""
    found = []

    def add(name: str, value: str, note: str) -> None:
        found.append({"name": name, "value": value, "note": note})

    if "data" in kinds:
        seen = kinds["data"]["metrics"]
        add("documents", f"{seen['documents']:,}", f"of {seen['pages']:,} pages")
    if "pretrain" in kinds:
        seen, shape = kinds["pretrain"]["metrics"], kinds["pretrain"]["probe"]["shape"]
        add("parameters", format_count(shape["parameters"]), f"vocabulary of {shape['vocab_size']:,}")
        if "validation_loss" in seen:
            loss = seen["validation_loss"]
            add("held-out loss", f"{loss:.3f}", f"perplexity {math.exp(loss):,.1f}")
    for task, asked in (
        (task, asked) for one in made if one["stage"] == "evaluate" for task, asked in one["metrics"].items()
    ):
        if "accuracy" in asked.get("think", {}) and "accuracy" in asked.get("off", {}):
            right, at_once = (100 * asked[mode]["accuracy"] for mode in ("think", "off"))
            add(f"{task} after thinking", f"{right:.1f} %", f"answered at once: {at_once:.1f} %")
            break
    add("time", duration(sum(manifest["wall_seconds"] for manifest in made)), f"{len(made)} stages")
    return found


def training(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Curves of a training stage from its metrics file, and the figures beside them."""
    records = life.records(folder, manifest["name"])
    steps = [record for record in records if "loss" in record]
    tokens = {0: 0} | {record["step"]: record["tokens"] for record in steps}
    train = [(float(record["tokens"]), record["loss"]) for record in steps]
    rate = [(float(record["tokens"]), record["learning_rate"]) for record in steps]
    held = [
        (float(tokens[record["step"]]), record["validation_loss"])
        for record in records
        if "validation_loss" in record and record["step"] in tokens
    ]
    shape = manifest["probe"]["shape"]
    guess = math.log(shape["vocab_size"])
    drawn = [Markup(charts.training(width, train, held, rate, guess)) for width in (WIDE, NARROW)]
    hover = [[record["step"], record["tokens"], record["loss"], record["learning_rate"]] for record in steps]
    stride = max(1, len(hover) // 600)
    return {
        "wide": drawn[0],
        "narrow": drawn[1],
        "hover": {"train": hover[::stride], "held": held},
        "held": held,
        "window": charts.window(train),
        "pattern": shape["pattern"],
    }


def funnel(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Pages left after each step, and why the others went, as shares of the pages read."""
    read = max(1, metrics["pages"])
    left = [
        {"name": name.replace("_", " "), "count": count, "share": count / read}
        for name, count in metrics["funnel"].items()
    ]
    most = max([1, *metrics["dropped"].values()])
    why = [
        {"name": REASONS.get(name, name.replace("_", " ")), "count": count, "share": count / most}
        for name, count in sorted(metrics["dropped"].items(), key=lambda pair: -pair[1])
    ]
    return {"left": left, "why": why, "dropped": sum(metrics["dropped"].values()), "read": metrics["pages"]}


def samples(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Prompts and what was written, with the settings."""
    path = folder / manifest["name"] / "samples.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))


def table(made: Sequence[Manifest]) -> list[dict[str, Any]]:
    """One row a stage: what it did, time and its share, memory, figures."""
    total = sum(manifest["wall_seconds"] for manifest in made) or 1.0
    return [
        {
            "name": manifest["name"],
            "about": ABOUT.get(manifest["stage"], manifest["stage"]),
            "seconds": manifest["wall_seconds"],
            "share": manifest["wall_seconds"] / total,
            "memory": manifest["peak_memory_bytes"],
            "sessions": manifest["sessions"],
            "figures": shown(manifest),
        }
        for manifest in made
    ]


def shown(manifest: Manifest) -> list[tuple[str, float]]:
    """The figures of a stage that a reader wants in its row."""
    figures = [(name, value) for name, value in flat(manifest["metrics"]) if isinstance(value, (int, float))]
    wanted = SHOWN.get(manifest["stage"])
    return figures if wanted is None else [(name, value) for name, value in figures if name in wanted]


def flat(metrics: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Metrics with dotted names as words; lists of reasons and steps have their own picture and are left out."""
    found: list[tuple[str, Any]] = []
    for name, value in metrics.items():
        words = f"{above} {name.replace('_', ' ')}".strip()
        if isinstance(value, dict):
            found += [] if name in ("funnel", "dropped") else flat(value, words)
        elif value is not None:
            found.append((words, value))
    return found


def lineage(made: Sequence[Manifest]) -> list[dict[str, Any]]:
    """One row a stage: its key, and the names and keys of what it was made from."""
    return [
        {
            "name": manifest["name"],
            "key": manifest["key"],
            "version": manifest["version"],
            "inputs": [(entry.get("stage") or entry["file"], entry["key"]) for entry in manifest["inputs"].values()],
        }
        for manifest in made
    ]


def machine(manifest: Manifest) -> list[tuple[str, str]]:
    """The machine in words."""
    seen = manifest["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in seen["versions"].items())
    return [
        ("processor", f"{seen['processor']}, {seen['cores']} cores"),
        ("memory", format_bytes(seen["memory_bytes"])),
        ("system", seen["system"]),
        ("software", f"Python {seen['python']}, {versions}"),
    ]
