"""The stage `sft`: conversations become packed rows, of which only what the assistant wrote is learned.

Three modes (Nemotron Nano 2, arXiv 2508.14444, sections 3.2 to 3.4). `on`: the thought as it is. `off`: no thought, in
the form of thinking off. `cut`: the thought ends early, at the end of a line, its closing tag is read but
not learned (the engine writes it), and the answer stays: so the model learns to answer from where it was stopped.

OUT/model/       the tuned model; with `lora` the adapters are merged into it
OUT/adapter/     with `lora`: the adapters alone, as PEFT writes them
OUT/tokens/      the rows as token shards with their mask

The stage `chat-tokens` writes such shards and trains nothing: for `distill`, say, from answers that a model has drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from whimbrel.align.lora import LoraSettings
from whimbrel.align.tuning import Tuning, check_counts, check_shares, load, read_rows, tune
from whimbrel.data import shards
from whimbrel.data.pack import Source, WholeDocuments
from whimbrel.errors import UserError
from whimbrel.events import Report
from whimbrel.model.checkpoint import resolve
from whimbrel.text import Tokenizer
from whimbrel.text.chat import tidy
from whimbrel.train.objective import CrossEntropy

Mode = Literal["on", "off", "cut"]


@dataclass(frozen=True)
class SftSettings(Tuning):
    """Supervised fine-tuning."""

    off: float = 0.1
    """Share of the conversations shown without their thought."""
    cut: float = 0.05
    """Share whose thought is cut at a place drawn uniformly."""
    heldout: float = 0.01
    length: int = 4096
    """Tokens of a row at most; conversations in it do not see each other, and none may be longer."""
    batch_rows: int = 1
    """Rows of a micro-batch."""
    lora: LoraSettings | None = None
    """Train adapters and leave the model's own weights alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "off", "cut")
        check_counts(self, "length", "batch_rows")
        check_modes(self.off, self.cut)


@dataclass(frozen=True)
class ChatTokensSettings:
    """Conversations as token shards: `off`, `cut`, `heldout` and `seed` are those of `sft`."""

    off: float = 0.0
    cut: float = 0.0
    heldout: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_shares(self, "off", "cut", "heldout")
        check_modes(self.off, self.cut)


def check_modes(off: float, cut: float) -> None:
    """Raise `UserError` where the shares of two modes are more than all."""
    if off + cut > 1:
        raise UserError(f"off {off} and cut {cut} are more than all; set cut to {1 - off:g} or less")


def encode(
    tokenizer: Tokenizer, row: Mapping[str, Any], mode: Mode, draw: np.random.Generator
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation in one mode, and for each whether it is learned.

    Only the last message's thought is cut, at a place that `draw` gives.
    """
    messages = tidy(row["messages"])
    thought = messages[-1].get("reasoning_content")
    if mode == "cut" and thought:
        messages[-1]["reasoning_content"] = shorten(tokenizer, thought, draw)
        return tokenizer.encode_chat(messages, tools=row.get("tools"), forced_close=True)
    return tokenizer.encode_chat(messages, tools=row.get("tools"), thinking=mode != "off")


def shorten(tokenizer: Tokenizer, thought: str, draw: np.random.Generator) -> str:
    """A thought stopped after a number of tokens, all equally likely, and then at the end of the line.

    This is where the engine stops a thought whose budget is spent. A thought of one line is stopped where it stands.
    """
    ids = tokenizer.encode(thought)
    kept = tokenizer.decode(ids[: int(draw.integers(1, max(len(ids), 2)))]).rstrip("\ufffd")
    end = thought.find("\n", max(len(kept) - 1, 0))
    return thought[:end] if end >= 0 else thought if "\n" in thought else kept


Modes = SftSettings | ChatTokensSettings


def modes(settings: Modes, count: int) -> tuple[list[Mode], list[bool]]:
    """The mode of each of `count` conversations, and whether it is held out."""
    draws_C2 = np.random.default_rng([settings.seed, 1]).random((count, 2))
    chosen: list[Mode] = ["off" if u < settings.off else "cut" if u < settings.off + settings.cut else "on"
                          for u in draws_C2[:, 0]]  # fmt: skip
    return chosen, (draws_C2[:, 1] < settings.heldout).tolist()


def write_rows(
    settings: Modes, rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, out: Path, report: Report
) -> dict[str, int]:
    """Shards `train` and, if anything is held out, `heldout`; returns how many conversations are in which mode."""
    chosen, held = modes(settings, len(rows))
    report({"event": "log", "text": f"encoding {len(rows):,} conversations"})

    def side(wanted: bool) -> Iterator[shards.Tokens]:
        for number, row in enumerate(rows):
            if held[number] == wanted:
                ids, learn = encode(tokenizer, row, chosen[number], np.random.default_rng([settings.seed, 2, number]))
                yield shards.Tokens(ids, learn, {"row": number, "mode": chosen[number]})

    for name, wanted in (("train", False), ("heldout", True)):
        if wanted in held and not (out / f"{name}.idx").exists():
            shards.write(out / name, side(wanted), tokenizer.vocab_size)
    return {mode: chosen.count(mode) for mode in ("on", "off", "cut")}


def run_chat_tokens(
    settings: ChatTokensSettings, inputs: Mapping[str, Path], out: Path, report: Report
) -> dict[str, Any]:
    """Write the input `conversations` as shards, in the words of the input `tokenizer` (a model's folder will do)."""
    rows = read_rows(inputs["conversations"], "conversations", ["messages"])
    counts = write_rows(settings, rows, Tokenizer.load(resolve(inputs["tokenizer"])), out, report)
    return {"tokens": shards.TokenShards(out / "train").tokens} | counts


def run(settings: SftSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Tune the input `model` on the input `conversations`; goes on from what it finds in `out`."""
    rows = read_rows(inputs["conversations"], "conversations", ["messages"])
    share = settings.meet()
    model, tokenizer = load(inputs["model"], share.device)
    counts = share.once(lambda: write_rows(settings, rows, tokenizer, out / "tokens", report))

    def packed(name: str, seed: int) -> Source:
        tokens = shards.TokenShards(out / "tokens" / name)
        return Source(WholeDocuments(tokens, settings.length, seed), settings.batch_rows)

    held = packed("heldout", 0) if (out / "tokens" / "heldout.idx").exists() else None
    source = packed("train", settings.seed)
    figures = tune(settings, CrossEntropy(), source, held, model, inputs, out, report, settings.lora)
    model.save(out / "model", resolve(inputs["model"]))
    return figures | counts
