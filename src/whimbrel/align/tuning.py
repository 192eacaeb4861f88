"""What the stages of this room share: rows of JSONL files, shuffled batches, one way to tune."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from whimbrel.align import lora
from whimbrel.data.order import Permutation
from whimbrel.errors import UserError
from whimbrel.events import Report
from whimbrel.model import LanguageModel
from whimbrel.model.checkpoint import resolve
from whimbrel.parallel import Share
from whimbrel.text import Tokenizer
from whimbrel.train.loop import TrainSettings, train
from whimbrel.train.objective import Objective
from whimbrel.train.stages import check_device, torch_device
from whimbrel.verify.math import ASK


def read_rows(source: Path, name: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Every row of a JSONL file; a folder stands for its NAME.jsonl. UserError for a row without one of the keys.

    A row as GSM8K's authors publish it has every key that a conversation or a prompt needs.
    """
    path = source / f"{name}.jsonl" if source.is_dir() else source
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a JSONL file, or a folder that holds {name}.jsonl")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = _gsm8k(json.loads(line))
            missing = [key for key in keys if key not in row]
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); write one object a line") from error
        if missing:
            raise UserError(f"{path}, line {number} has no {missing[0]!r}; give every row {', '.join(keys)}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty; write at least one row")
    return rows


def _gsm8k(row: Any) -> Any:
    """`{"question", "answer": "steps #### number"}` as a solution to learn and a problem to try; all else as it is.

    The calculator's notes (`<<3*4=12>>`) are left out, and the number stands as the prompt asks for it.
    """
    if not isinstance(row, dict) or "question" not in row or "####" not in str(row.get("answer")):
        return row
    steps, _, number = row["answer"].rpartition("####")
    asked = [{"role": "user", "content": row["question"] + ASK}]
    told = f"{re.sub('<<.*?>>', '', steps).strip()}\n\\boxed{{{number.strip()}}}"
    messages = [*asked, {"role": "assistant", "content": told}]
    return {"messages": messages, "prompt": asked, "answer": number.strip(), "verifier": "math"}


def load(source: Path, device: torch.device) -> tuple[LanguageModel, Tokenizer]:
    """The model of a folder, in float32 as training wants it, and its tokenizer."""
    return LanguageModel.load(source, dtype="float32", device=device), Tokenizer.load(resolve(source))


def check_shares(settings: Any, *names: str) -> None:
    """Raise `UserError` unless these settings lie in [0, 1]."""
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise UserError(f"{name} is {getattr(settings, name)}; set {name} between 0 and 1")


def check_counts(settings: Any, *names: str) -> None:
    """Raise `UserError` unless these settings are 1 or more."""
    for name in names:
        if getattr(settings, name) < 1:
            raise UserError(f"{name} is {getattr(settings, name)}; set {name} to 1 or more")


def check_axes(settings: Any, why: str, *names: str) -> None:
    """Raise `UserError` where `train.parallel` has one of these axes, which the stage cannot use."""
    axes = settings.train.parallel
    for name in names:
        if (size := getattr(axes, name)) > 1:
            raise UserError(
                f"train.parallel.{name} is {size}, but {why}; set train.parallel.{name} to 1 and "
                f"train.parallel.data to {size * axes.data}"
            )


@dataclass(frozen=True)
class Tuning:
    """Settings of every stage that runs the training loop."""

    heldout: float = 0.05
    """Share of the rows that is only looked at."""
    seed: int = 0
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU if there is one."""
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        check_shares(self, "heldout")
        check_device(self.device)
        if getattr(self, "lora", None) is not None:
            check_axes(self, "adapters (lora) are not cut", "tensor")

    def meet(self) -> Share:
        """Join the other processes, if there are any, before the model is spread over them."""
        return Share.meet(self.train.parallel, torch_device(self.device))


class Source(Protocol):
    """Batches by index, and how many make an epoch."""

    @property
    def length(self) -> int:
        """Batches of an epoch, the last one perhaps filled from the next."""

    def batch(self, index: int) -> Any:
        """The batch of an index."""


@dataclass(frozen=True)
class Shuffled:
    """Batches of some numbered things, in an order that is new in every epoch; `make` builds one from its numbers."""

    numbers: NDArray[np.int64]
    size: int
    seed: int
    make: Callable[[NDArray[np.int64]], Any]

    @property
    def length(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.numbers) // self.size)

    def batch(self, index: int) -> Any:
        """The batch of an index."""
        places = np.arange(index * self.size, (index + 1) * self.size)
        return self.make(self.numbers[Permutation(len(self.numbers), self.seed)(places)])


def parts(
    count: int, size: int, settings: Tuning, make: Callable[[NDArray[np.int64]], Any]
) -> tuple[Shuffled, Shuffled | None]:
    """Sources of what is learned and of what is held out, None if that is nothing."""
    order = np.random.default_rng([settings.seed, 3]).permutation(count)
    held = round(settings.heldout * count)
    source = Shuffled(order[held:], size, settings.seed, make)
    return source, Shuffled(order[:held], size, 0, make) if held else None


def tune(
    settings: Tuning,
    objective: Objective,
    source: Source,
    held: Source | None,
    model: LanguageModel,
    inputs: Mapping[str, Path],
    out: Path,
    report: Report,
    adapter: lora.LoraSettings | None = None,
) -> dict[str, Any]:
    """Train a model in place, or adapters in it, which are saved and then merged. Returns the figures of the run."""
    how = settings.train
    if held is not None:
        how = replace(how, validate_batches=min(how.validate_batches, held.length))
    if adapter is not None:
        lora.attach(model, adapter, settings.seed)
    figures = train(how, objective, source, held, model, out, report)
    if adapter is not None:
        lora.save(model, out / "adapter", adapter, str(inputs["model"]))
        lora.merge(model)
    return figures
