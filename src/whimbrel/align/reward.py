"""The stage `reward`: a linear map from the last token's hidden state to attributes of the answer, by regression.

Nemotron-4 340B (arXiv 2406.11704, section 3.1): the softmax layer is replaced by one projection from the end of the
response to the five attributes of HelpSteer2 (arXiv 2406.08673), trained by squared error; what is not rated is left
out. The reward of an answer is a weighted sum of its attributes. S conversations, A attributes, D model width.

OUT/model/              the trained backbone
OUT/head.safetensors    `reward.weight` [A, D] and `reward.bias` [A]; OUT/head.json: attributes and their weights
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn

from whimbrel.align.tuning import Tuning, check_axes, check_counts, load, parts, read_rows, tune
from whimbrel.errors import UserError
from whimbrel.events import Report
from whimbrel.files import atomic_write
from whimbrel.model import LanguageModel
from whimbrel.model.checkpoint import resolve
from whimbrel.model.layout import Layout
from whimbrel.parallel import whole
from whimbrel.text import Tokenizer
from whimbrel.train.loop import TrainSettings
from whimbrel.train.objective import Term

Floats = NDArray[np.float32]
HELPSTEER = {"helpfulness": 0.3, "correctness": 0.74, "coherence": 0.46, "complexity": 0.47, "verbosity": -0.33}
"""Attributes of HelpSteer2, each from 0 to 4, and their weights in the reward of Nemotron-4-340B-Reward."""


@dataclass(frozen=True)
class RewardSettings(Tuning):
    """A reward model by regression."""

    weights: dict[str, float] = field(default_factory=lambda: dict(HELPSTEER))
    """Attributes, in the order of the head's outputs, and their weights in the reward."""
    conversations: int = 16
    """Conversations of a micro-batch."""
    heldout: float = 0.1
    train: TrainSettings = field(default_factory=lambda: TrainSettings(steps=200))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "conversations")
        check_axes(self, "conversations with one label are not cut", "context")
        if not self.weights:
            raise UserError("weights is empty; set it to attributes and their weights, such as {correctness: 1.0}")


@dataclass(frozen=True)
class RatedBatch:
    """Conversations laid end to end, and what their last answers were given; NaN where nothing was."""

    tokens_T: NDArray[np.int64]
    lengths: tuple[int, ...]
    labels_SA: Floats


def predict(model: LanguageModel, batch: RatedBatch) -> Tensor:
    """[S, A] attributes, read off the last token of each conversation; the model carries its head as `reward`."""
    rows_S = torch.from_numpy(np.cumsum(batch.lengths) - 1).to(model.device)
    layout = Layout.of(batch.lengths, rows=rows_S, device=model.device)
    hidden_SD = model(torch.from_numpy(batch.tokens_T).to(model.device), layout)
    return model.get_submodule("reward")(hidden_SD)


@dataclass(frozen=True)
class Regression:
    """The term `error`: squared distance to the label, a mean over all labels there are."""

    def counts(self, batch: RatedBatch) -> dict[str, int]:
        """Labels."""
        return {"error": int(np.isfinite(batch.labels_SA).sum())}

    def __call__(self, model: LanguageModel, batch: RatedBatch) -> dict[str, Term]:
        """The term of a batch."""
        labels_SA = torch.from_numpy(batch.labels_SA).to(model.device)
        rated_SA = labels_SA.isfinite()
        away_SA = (predict(model, batch) - labels_SA.nan_to_num()) * rated_SA
        return {"error": Term(away_SA.square().sum(), int(rated_SA.sum()))}


@dataclass(frozen=True)
class Ratings:
    """Encoded conversations and their labels, of which `of` makes batches."""

    ids: Sequence[NDArray[np.int64]]
    labels_SA: Floats

    def of(self, chosen: NDArray[np.int64]) -> RatedBatch:
        """The conversations of these numbers as one batch."""
        parts = [self.ids[number] for number in chosen.tolist()]
        return RatedBatch(np.concatenate(parts), tuple(len(part) for part in parts), self.labels_SA[chosen])


def attach(model: LanguageModel, attributes: int) -> LanguageModel:
    """Give a model a head that says 0 to everything."""
    head = nn.Linear(model.config.hidden_size, attributes, device=model.device, dtype=model.dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.reward = head
    return model


class RewardModel:
    """A trained reward model of a stage's folder."""

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        about = json.loads((Path(folder) / "head.json").read_text(encoding="utf-8"))
        self.weights: dict[str, float] = about["weights"]
        model, self.tokenizer = load(Path(folder), torch.device(device))
        self.model = attach(model, len(self.weights))
        self.model.load_state_dict(load_file(Path(folder) / "head.safetensors"), strict=False)

    @torch.inference_mode()
    def attributes(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Floats:
        """[S, A] what each conversation's last answer would be given, in the order of `weights`."""
        encoded = [np.asarray(self.tokenizer.encode_chat(messages)[0]) for messages in conversations]
        unknown = np.full((len(encoded), len(self.weights)), math.nan, np.float32)
        return _predict_all(self.model, Ratings(encoded, unknown), np.arange(len(encoded)))

    def rewards(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
        """The weighted sum of the attributes of each."""
        return (self.attributes(conversations) @ np.asarray(list(self.weights.values()), np.float32)).tolist()


def agreement(predicted_S: Floats, labels_S: Floats) -> float:
    """Share of the couples with different labels that the predictions put in the right order; NaN without couples."""
    sign = np.sign(labels_S[:, None] - labels_S[None])
    found = np.sign(predicted_S[:, None] - predicted_S[None])
    return float((sign[sign > 0] == found[sign > 0]).mean()) if (sign > 0).any() else math.nan


def read_ratings(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, settings: RewardSettings) -> Ratings:
    """Encode rows {"messages", "attributes": {name: number}}; an attribute that is missing or -100 is not rated."""
    ids = [np.asarray(tokenizer.encode_chat(row["messages"])[0]) for row in rows]
    labels = [[row["attributes"].get(name, -100) for name in settings.weights] for row in rows]
    labels_SA = np.asarray(labels, np.float32)
    labels_SA[labels_SA == -100] = math.nan
    return Ratings(ids, labels_SA)


def run(settings: RewardSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Train the input `model` with a new head on the input `rated`; goes on from what it finds in `out`."""
    rows = read_rows(inputs["rated"], "rated", ["messages", "attributes"])
    share = settings.meet()
    model, tokenizer = load(inputs["model"], share.device)
    ratings = read_ratings(rows, tokenizer, settings)
    attach(model, len(settings.weights))
    source, held = parts(len(rows), settings.conversations, settings, ratings.of)
    figures = tune(settings, Regression(), source, held, model, inputs, out, report)
    if held is not None:
        predicted_SA, labels_SA = _predict_all(model, ratings, held.numbers), ratings.labels_SA[held.numbers]
        for place, name in enumerate(settings.weights):
            figures[f"agreement_{name}"] = agreement(predicted_SA[:, place], labels_SA[:, place])
    head = {name: whole(tensor) for name, tensor in model.state_dict().items() if name.startswith("reward.")}
    del model.reward

    def write() -> None:
        with atomic_write(out / "head.safetensors", "wb") as file:
            file.write(save(head))
        with atomic_write(out / "head.json") as file:
            json.dump({"weights": settings.weights}, file)

    share.once(write)
    model.save(out / "model", resolve(inputs["model"]))
    return {name: value for name, value in figures.items() if value == value}


@torch.no_grad()
def _predict_all(model: LanguageModel, ratings: Ratings, numbers: NDArray[np.int64], size: int = 16) -> Floats:
    some = [predict(model, ratings.of(numbers[at : at + size])) for at in range(0, len(numbers), size)]
    return torch.cat(some).float().cpu().numpy()
