"""The stage `dpo`: of two answers to a prompt the chosen one becomes likelier than the rejected one.

DPO (Rafailov et al., arXiv 2305.18290) and reward-aware RPO (Nemotron-4 340B, arXiv 2406.11704, section 3.3.2), both
beside an optional share of the chosen answers' own cross-entropy. The reference is the model at the start; its
log-probabilities are computed once and kept in OUT/reference.npy. T packed tokens, R learned tokens, P pairs; a pair is
two documents, the chosen one first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from whimbrel import ops
from whimbrel.align.lora import LoraSettings
from whimbrel.align.tuning import Tuning, check_axes, check_counts, load, parts, read_rows, tune
from whimbrel.errors import UserError, nearest
from whimbrel.events import Report
from whimbrel.files import atomic_write
from whimbrel.model import LanguageModel
from whimbrel.model.checkpoint import resolve
from whimbrel.model.layout import Layout
from whimbrel.parallel import Share
from whimbrel.parallel.mesh import ALONE
from whimbrel.text import Tokenizer
from whimbrel.train.loop import TrainSettings
from whimbrel.train.objective import IGNORE, Term

LOSSES = ("dpo", "rpo")


@dataclass(frozen=True)
class PreferenceSettings(Tuning):
    """Preference tuning."""

    loss: str = "dpo"
    """`dpo`, or `rpo`: the margin is to be as large as the rewards' gap says, not as large as possible."""
    beta: float = 0.1
    """Scale of the log-probability ratios; the smaller, the further the model may move from the reference."""
    reward_scale: float = 1.0
    """Scale of the gap between the rewards (rpo only)."""
    sft: float = 1e-5
    """Weight of the chosen answers' cross-entropy, a mean over their tokens."""
    pairs: int = 16
    """Pairs of a micro-batch."""
    lora: LoraSettings | None = None
    """Train adapters and leave the model's own weights alone."""
    train: TrainSettings = field(default_factory=lambda: TrainSettings(steps=100))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "pairs")
        check_axes(self, "pairs are not cut", "context")
        if self.loss not in LOSSES:
            raise UserError(f"loss is {self.loss!r}; {nearest(self.loss, LOSSES)} (set loss to dpo or rpo)")
        for name in ("beta", "reward_scale"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; set {name} above 0, for example 0.1")
        if self.sft < 0:
            raise UserError(f"sft is {self.sft}; set sft to 0 or more, for example 1e-5")


def dpo(margin: Tensor) -> Tensor:
    """-log sigmoid(a), with a = beta (log-ratio of the chosen answer - log-ratio of the rejected one)."""
    return -F.logsigmoid(margin)


def rpo(margin: Tensor, gap: Tensor) -> Tensor:
    """KL between two coins: heads with sigmoid(b) by the rewards (b = scale times their gap), with sigmoid(a) by the
    policy.

    Zero where a = b; for b to infinity it is `dpo`. NeMo-Aligner calls it rpo_bwd_kl.
    """
    heads = gap.sigmoid() * (F.logsigmoid(gap) - F.logsigmoid(margin))
    return heads + (-gap).sigmoid() * (F.logsigmoid(-gap) - F.logsigmoid(-margin))


@dataclass(frozen=True)
class PairBatch:
    """Pairs laid end to end: chosen, rejected, chosen, ..."""

    tokens_T: NDArray[np.int64]
    targets_T: NDArray[np.int64]
    lengths: tuple[int, ...]
    reference_P2: NDArray[np.float32]
    """Summed log-probability of each answer under the reference."""
    gap_P: NDArray[np.float32]
    """Reward of the chosen answer minus that of the rejected one."""


def log_probs(model: LanguageModel, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer, summed over its tokens, and its number of tokens: two [P, 2]."""
    device = model.device
    targets_T = torch.from_numpy(batch.targets_T).to(device)
    rows_R = (targets_T != IGNORE).nonzero()[:, 0]
    layout = Layout.of(batch.lengths, rows=rows_R, device=device)
    hidden_RD = model(torch.from_numpy(batch.tokens_T).to(device), layout)
    logp_R = model.head(hidden_RD, lambda hidden, weight: ops.log_prob(hidden, weight, targets_T[rows_R]))
    answer_R = layout.segments.sequence_T[rows_R]
    sums = torch.zeros(len(batch.lengths), dtype=torch.float64, device=device).index_add(0, answer_R, logp_R.double())
    return sums.view(-1, 2), torch.bincount(answer_R, minlength=len(batch.lengths)).view(-1, 2)


@dataclass(frozen=True)
class Preference:
    """Terms `preference` (a mean over pairs) and `sft` (over tokens of chosen answers); measured only: `accuracy`, the
    share of pairs with a margin above 0, and `margin`, its mean."""

    loss: str
    beta: float
    reward_scale: float
    sft: float

    def counts(self, batch: PairBatch) -> dict[str, int]:
        """Pairs, and tokens of the chosen answers."""
        pairs, ends = len(batch.gap_P), np.cumsum(batch.lengths)
        chosen = sum(int((part != IGNORE).sum()) for part in np.split(batch.targets_T, ends[:-1])[::2])
        return {"preference": pairs, "sft": chosen, "accuracy": pairs, "margin": pairs}

    def __call__(self, model: LanguageModel, batch: PairBatch) -> dict[str, Term]:
        """The terms of a batch."""
        pairs, (logp_P2, tokens_P2) = len(batch.gap_P), log_probs(model, batch)
        ratio_P2 = logp_P2 - torch.from_numpy(batch.reference_P2).to(logp_P2)
        margin_P = self.beta * (ratio_P2[:, 0] - ratio_P2[:, 1])
        gap_P = self.reward_scale * torch.from_numpy(batch.gap_P).to(logp_P2)
        loss_P = dpo(margin_P) if self.loss == "dpo" else rpo(margin_P, gap_P)
        seen_P = margin_P.detach()
        return {
            "preference": Term(loss_P.sum(), pairs),
            "sft": Term(-logp_P2[:, 0].sum(), int(tokens_P2[:, 0].sum()), self.sft),
            "accuracy": Term((seen_P > 0).sum().float(), pairs, 0.0),
            "margin": Term(seen_P.sum(), pairs, 0.0),
        }


@dataclass(frozen=True)
class Pairs:
    """Encoded pairs, of which `of` makes batches."""

    answers: Sequence[Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]]
    """Of each pair: tokens and targets of the chosen and of the rejected answer, prompt included."""
    gap_P: NDArray[np.float32]
    reference_P2: NDArray[np.float32]

    def of(self, chosen: NDArray[np.int64]) -> PairBatch:
        """The pairs of these numbers as one batch."""
        both = [answer for number in chosen.tolist() for answer in self.answers[number]]
        tokens, targets = (np.concatenate([answer[side] for answer in both]) for side in (0, 1))
        lengths = tuple(len(answer[0]) for answer in both)
        return PairBatch(tokens, targets, lengths, self.reference_P2[chosen], self.gap_P[chosen])


def read_pairs(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Pairs:
    """Encode rows {"prompt", "chosen", "rejected"}, whose values are lists of messages or text; the reference is 0."""
    answers = []
    for row in rows:
        pair = []
        for side in ("chosen", "rejected"):
            messages = [*_messages(row["prompt"], "user"), *_messages(row[side], "assistant")]
            ids, learn = tokenizer.encode_chat(messages)
            targets = np.append(np.where(learn, ids, IGNORE)[1:], IGNORE)
            pair.append((np.asarray(ids, np.int64), targets.astype(np.int64)))
        answers.append(pair)
    gaps = [float(row.get("chosen_reward", 1.0)) - float(row.get("rejected_reward", 0.0)) for row in rows]
    return Pairs(answers, np.asarray(gaps, np.float32), np.zeros((len(rows), 2), np.float32))


def _messages(value: Any, role: str) -> list[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


@torch.no_grad()
def reference(pairs: Pairs, model: LanguageModel, size: int, path: Path, share: Share = ALONE) -> NDArray[np.float32]:
    """[P, 2] log-probabilities under a model, `size` pairs at a time: computed once, then read from the file.

    The model is still whole on every rank of `share`: each computes a part, the first one writes and tells all.
    """
    if not share.once(path.exists):
        every = np.arange(len(pairs.answers))
        starts = range(0, len(every), size)[share.rank :: share.axes.processes]
        mine = {at: log_probs(model, pairs.of(every[at : at + size]))[0].float().cpu().numpy() for at in starts}
        some = {at: found for part in share.collect(mine) for at, found in part.items()}

        def write() -> None:
            with atomic_write(path, "wb") as file:
                np.save(file, np.concatenate([some[at] for at in sorted(some)]))

        share.once(write)
    return share.once(lambda: np.load(path))


def run(settings: PreferenceSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Tune the input `model` on the input `pairs`; goes on from what it finds in `out`."""
    rows = read_rows(inputs["pairs"], "pairs", ["prompt", "chosen", "rejected"])
    share = settings.meet()
    model, tokenizer = load(inputs["model"], share.device)
    pairs = read_pairs(rows, tokenizer)
    pairs = replace(pairs, reference_P2=reference(pairs, model, settings.pairs, out / "reference.npy", share))
    source, held = parts(len(rows), settings.pairs, settings, pairs.of)
    objective = Preference(settings.loss, settings.beta, settings.reward_scale, settings.sft)
    figures = tune(settings, objective, source, held, model, inputs, out, report, settings.lora)
    model.save(out / "model", resolve(inputs["model"]))
    return figures | {"pairs": len(source.numbers)}
