"""One optimizer step: micro-batches, one division, one norm, and a stop before a number not finite does harm."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from whimbrel.errors import UserError
from whimbrel.model.language import LanguageModel
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


def sum_over_ranks(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Add named numbers (the same names on all ranks) over the ranks, in float64; give them back if there is one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return dict(values)
    names = sorted(values)
    total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def total_counts(objective: Objective, batches: Sequence[Any], device: torch.device) -> dict[str, float]:
    """Counts of every term over all micro-batches and ranks, before anything is computed."""
    counts: Counter[str] = Counter()
    for batch in batches:
        counts.update(objective.counts(batch))
    return sum_over_ranks(counts, device)


def weighted(terms: Mapping[str, Term], counts: Mapping[str, float]) -> Tensor:
    """The share of one micro-batch in the loss: scalar, with a gradient."""
    parts = [term.weight * term.sum / max(counts[name], 1) for name, term in terms.items()]
    return torch.stack(parts).sum()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Run matrix products in bfloat16 over float32 weights, or everything as it is (`float32`)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def accumulate(
    model: LanguageModel, objective: Objective, batches: Sequence[Any], precision: str = "float32", *, learn: bool
) -> tuple[float, dict[str, float]]:
    """Loss and mean of each term over all micro-batches and ranks; with `learn`, its gradient is added to `.grad`.

    Without `learn` no graph is kept: this is also how held-out batches are scored.
    """
    device = next(model.parameters()).device
    counts = total_counts(objective, batches, device)
    sums: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    for batch in batches:
        with torch.set_grad_enabled(learn), autocast(device, precision):
            terms = objective(model, batch)
        promised = objective.counts(batch)
        assert {name: term.count for name, term in terms.items()} == promised, "counts changed between promise and loss"
        if learn:
            weighted(terms, counts).backward()
        for name, term in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + term.sum.detach()
            weights[name] = term.weight
    totals = sum_over_ranks({name: total.item() for name, total in sums.items()}, device)
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
) -> Step:
    """Move the weights once.

    Raises `NotFinite`, with weights and optimizer as they were, if loss or gradient is not finite.

    `clip` is the largest gradient norm let through; 0 lets everything through.
    """
    loss, terms = accumulate(model, objective, batches, precision, learn=True)
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    grad_norm = float(norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        culprit = _culprit(model, terms)
        optimizer.zero_grad(set_to_none=True)
        raise NotFinite(culprit)
    if clip:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.touch()
    return Step(loss, terms, grad_norm)


def _culprit(model: nn.Module, terms: Mapping[str, float]) -> str:
    """Name the first number that is not finite: a term of the loss, else the gradient of a parameter."""
    for name, mean in terms.items():
        if not math.isfinite(mean):
            return f"the term {name!r} of the loss is {mean}"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the loss is finite, but the gradient of {name} is not"
    return "the norm of the gradient is too large for float32, although every part of it is finite"
