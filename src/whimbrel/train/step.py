"""One optimizer step: micro-batches, one division, one norm, and a stop before a number not finite does harm."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whimbrel import ops
from whimbrel.errors import UserError
from whimbrel.model.language import LanguageModel
from whimbrel.parallel import gradients
from whimbrel.parallel.context import piece_of
from whimbrel.parallel.mesh import ALONE, Share
from whimbrel.train.objective import Objective, Term


class NotFinite(UserError):
    """A loss or gradient is infinite or not a number; the weights have not been touched."""


@dataclass(frozen=True)
class Step:
    """What a step saw."""

    loss: float
    """Sum over terms of weight * sum / count, over all micro-batches and ranks."""
    terms: dict[str, float]
    """Mean of each term."""
    grad_norm: float
    """Euclidean norm of the gradient before clipping."""


def total_counts(objective: Objective, batches: Sequence[Any], share: Share = ALONE, idle: int = 0) -> dict[str, float]:
    """Counts of every term over all micro-batches (but the last `idle`) and ranks, before anything is computed."""
    counts: Counter[str] = Counter()
    for number, batch in enumerate(batches):
        real = number < len(batches) - idle
        counts.update({name: count * real for name, count in objective.counts(batch).items()})
    return share.total(counts)


def weighted(terms: Mapping[str, Term], counts: Mapping[str, float]) -> Tensor:
    """The share of one micro-batch in the loss: scalar, with a gradient."""
    parts = [term.weight * term.sum / max(counts[name], 1) for name, term in terms.items()]
    return torch.stack(parts).sum()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Run matrix products in bfloat16 over float32 weights, or everything as it is (`float32`)."""
    if device.type == "cpu":
        return ops.rounding(precision == "bfloat16")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def accumulate(
    model: LanguageModel,
    objective: Objective,
    batches: Sequence[Any],
    precision: str = "float32",
    *,
    learn: bool,
    idle: int = 0,
) -> tuple[float, dict[str, float]]:
    """Loss and mean of each term over all micro-batches and ranks; with `learn`, its gradient is added to `.grad`.

    Without `learn` no graph is kept: this is also how held-out batches are scored. `batches` are those of this rank;
    the last `idle` of them are computed, because other ranks need this one's help, and neither counted nor learned.
    """
    share: Share = model.share or ALONE
    if share.axes.context > 1:
        batches = [piece_of(batch, share) for batch in batches]
    counts = total_counts(objective, batches, share, idle)
    sums: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    for number, batch in enumerate(batches):
        real = number < len(batches) - idle
        with torch.set_grad_enabled(learn), autocast(model.device, precision):
            terms = objective(model, batch)
        promised = objective.counts(batch)
        assert {name: term.count for name, term in terms.items()} == promised, "counts changed between promise and loss"
        if learn:
            with autocast(model.device, precision) if model.device.type == "cpu" else nullcontext():
                (weighted(terms, counts) * real).backward()  # autocast of a GPU remembers by itself
        for name, term in terms.items():
            seen = term.sum.detach() * real
            sums[name] = sums.get(name, torch.zeros((), device=model.device)) + seen
            weights[name] = term.weight
    totals = share.total({name: total.item() for name, total in sums.items()})
    means = {name: total / max(counts[name], 1) for name, total in totals.items()}
    return sum(weights[name] * mean for name, mean in means.items()), means


def train_step(
    model: LanguageModel,
    objective: Objective,
    batches: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    *,
    clip: float,
    precision: str = "float32",
    idle: int = 0,
) -> Step:
    """Move the weights once.

    Raises `NotFinite`, with weights and optimizer as they were, if loss or gradient is not finite.

    `clip` is the largest gradient norm let through; 0 lets everything through. `idle` as in `accumulate`.
    """
    loss, terms = accumulate(model, objective, batches, precision, learn=True, idle=idle)
    share: Share = model.share or ALONE
    if share.axes.processes > 1:
        gradients.finish(model, share)
        norm = gradients.norm(model, share)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    grad_norm = float(norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        found = share.collect(_culprit(model, terms))
        culprit = next((name for name in found if name), UNKNOWN)
        optimizer.zero_grad(set_to_none=True)
        raise NotFinite(culprit)
    if clip:
        scale = torch.clamp(clip / (norm + 1e-6), max=1.0)
        if float(scale) < 1.0:
            torch._foreach_mul_([gradient for _, gradient in gradients.present(model)], scale)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.touch()
    return Step(loss, terms, grad_norm)


UNKNOWN = "the norm of the gradient is too large for float32, although every part of it is finite"


def _culprit(model: LanguageModel, terms: Mapping[str, float]) -> str:
    """Name the first number here that is not finite: a term of the loss, else the gradient of a parameter."""
    for name, mean in terms.items():
        if not math.isfinite(mean):
            return f"the term {name!r} of the loss is {mean}"
    for name, gradient in gradients.present(model):
        if not torch.isfinite(gradient).all():
            return f"the loss is finite, but the gradient of {name} is not"
    return ""
