"""Figures of an evaluation from its samples: `results.json` is made of `samples.jsonl` and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whimbrel.errors import UserError
from whimbrel.evaluate import statistics
from whimbrel.evaluate.runner import DOWN, OUTCOMES, well_formed

Sample = Mapping[str, Any]
NOTHING = "the evaluation `against` answers none of these problems under these budgets; name one of the same tasks"
FILE, SAMPLES = "results.json", "samples.jsonl"


def right(sample: Sample) -> float:
    """1.0 for a correct sample."""
    return float(sample["outcome"] == "correct")


def share(samples: Sequence[Sample], value: Callable[[Sample], float]) -> statistics.Figure:
    """The mean of a value over samples, with its interval over clusters."""
    return statistics.share([[value(sample) for sample in group] for group in _by(samples, "cluster").values()])


def _by(samples: Sequence[Sample], *names: str) -> dict[Hashable, list[Sample]]:
    """Samples by the value of a field (of several: a tuple), in the order in which values first occur."""
    found: dict[Hashable, list[Sample]] = {}
    for sample in samples:
        values = tuple(sample[name] for name in names)
        found.setdefault(values if len(names) > 1 else values[0], []).append(sample)
    return found


def figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """The figures of one task under one budget.

    Samples that the engine could not make are left out of every share and counted in `outcomes` and `left_out`.
    `accuracy` is avg@k, `majority` maj@k, `pass_at` pass@1, 2, 4 … k, all with intervals clustered by problem.
    """
    made = [sample for sample in samples if sample["outcome"] != DOWN]
    outcomes = Counter(sample["outcome"] for sample in samples)
    found: dict[str, Any] = {"problems": len(_by(samples, "id")), "samples": len(samples)}
    found["outcomes"] = {outcome: outcomes[outcome] for outcome in OUTCOMES if outcomes[outcome]}
    found["left_out"] = len(samples) - len(made)
    if not made:
        return found
    found["accuracy"] = share(made, right)
    for name in ("thinking_tokens", "tokens"):
        found[name] = sum(sample[name] for sample in made) / len(made)
    found["well_formed"] = share(made, lambda sample: float(well_formed(sample)))
    found["thinking_ended"] = dict(Counter(sample["thinking_ended"] for sample in made))
    found |= _of_many(list(_by(made, "id").values()))
    if graded := [sample for sample in made if "strict" in sample]:
        found["instructions"] = _instructions(graded)
    groups = _by(made, "group")
    if len(groups) > 1:
        found["groups"] = {name: share(group, right) for name, group in groups.items()}
    return found


def _of_many(problems: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """maj@k and pass@1, 2, 4 … k of the problems that have all their k samples; nothing for k = 1."""
    k = max(len(group) for group in problems)
    whole = [group for group in problems if len(group) == k > 1]
    if not whole:
        return {}

    def figure(values: Sequence[float]) -> statistics.Figure:
        rows = [{"cluster": group[0]["cluster"], "value": value} for group, value in zip(whole, values, strict=True)]
        return share(rows, lambda row: row["value"])

    sizes = sorted({k, *(2**power for power in range(k.bit_length()))})
    counts = [int(sum(map(right, group))) for group in whole]
    found: dict[str, Any] = {"k": k}
    found["pass_at"] = {str(n): figure([statistics.pass_at(count, k, n) for count in counts]) for n in sizes}
    if any(sample["extracted"] is not None for group in whole for sample in group):
        votes = [[sample["extracted"] for sample in group] for group in whole]
        found["majority"] = figure(
            [statistics.majority(vote, list(map(right, group))) for vote, group in zip(votes, whole, strict=True)]
        )
    return found


def _instructions(samples: Sequence[Sample]) -> dict[str, statistics.Figure]:
    """IFEval's four figures: all instructions of a prompt, or each for itself; strictly, or in one of eight forms."""
    found, problems = {}, list(_by(samples, "cluster").values())
    for mode in ("strict", "loose"):
        found[f"prompt_{mode}"] = statistics.share([[float(all(one[mode])) for one in group] for group in problems])
        found[f"instruction_{mode}"] = statistics.share(
            [[float(verdict) for one in group for verdict in one[mode]] for group in problems]
        )
    return found


def summary(samples: Sequence[Sample]) -> dict[str, list[dict[str, Any]]]:
    """For each task its figures under each budget, in the order in which they were asked for: the budget's curve."""
    return {
        str(name): [{"budget": budget, **figures(group)} for budget, group in _by(of_task, "budget").items()]
        for name, of_task in _by(samples, "task").items()
    }


def check_common(before: Sequence[Sample], asked: Iterable[Sample]) -> None:
    """`UserError`, before anything is generated, where `before` knows none of what is asked: task, budget, prompt."""
    known = {(sample["task"], sample["budget"], _asked(sample)) for sample in before}
    if not any((one["task"], one["budget"], _asked(one)) in known for one in asked):
        raise UserError(NOTHING)


def thinking(curve: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a budget's curve says in four figures; nothing for fewer than three budgets besides off, or without off.

    `well_formed`: the least share over all budgets. `falls`: how far a larger budget lies below a smaller one, from the
    lower end of one interval to the upper end of the other; up to 0 the curve is monotone within intervals. `half`: the
    accuracy at half the mean thought, on the line between the two budgets around it; `half_between`: how far it is from
    thinking off below and from no limit above, whichever is nearer.
    """
    found = [one for one in curve if "accuracy" in one]
    off = next((one for one in found if one["budget"] == 0), None)
    limited = sorted((one for one in found if one["budget"]), key=lambda one: one["budget"])
    full = next((one for one in found if one["budget"] is None), None)
    if off is None or full is None or len(limited) < 2:
        return {}
    climb = [*limited, full]
    points = sorted((one["thinking_tokens"], one["accuracy"]["mean"]) for one in climb)
    thought, rate = (np.array(values, np.float64) for values in zip(*points, strict=True))
    half = float(np.interp(full["thinking_tokens"] / 2, thought, rate))
    between = min(half - off["accuracy"]["mean"], full["accuracy"]["mean"] - half)
    least = min(one["well_formed"]["mean"] for one in found)
    falls = statistics.falls([one["accuracy"] for one in climb])
    return {"well_formed": least, "falls": falls, "half": half, "half_between": between}


def compared(before: Sequence[Sample], after: Sequence[Sample]) -> dict[str, list[dict[str, Any]]]:
    """The paired comparison of two evaluations, by task and budget, on the problems that both have answers to.

    `UserError` if they have none in common.
    """
    old, new = _means(before), _means(after)
    found: dict[str, list[dict[str, Any]]] = {}
    for (task, budget), means in new.items():
        others = old.get((task, budget), {})
        both = [name for name in means if name in others]
        if both:
            pair = statistics.paired([others[name] for name in both], [means[name] for name in both])
            found.setdefault(task, []).append({"budget": budget, **pair})
    if not found:
        raise UserError(NOTHING)
    return found


def _means(samples: Sequence[Sample]) -> dict[Any, dict[Hashable, float]]:
    """By (task, budget) the mean of each cluster, known by what was asked in it."""
    found: dict[Any, dict[Hashable, float]] = {}
    for place, group in _by([sample for sample in samples if sample["outcome"] != DOWN], "task", "budget").items():
        clusters = _by(group, "cluster").values()
        found[place] = {frozenset(map(_asked, one)): sum(map(right, one)) / len(one) for one in clusters}
    return found


def _asked(sample: Sample) -> str:
    prompt = sample["prompt"]
    return str(prompt if isinstance(prompt, str) else prompt[-1]["content"])


def read_samples(folder: Path) -> list[Sample]:
    """The samples of an evaluation's folder; `UserError` if it is none."""
    path = folder / SAMPLES
    if not path.is_file():
        raise UserError(f"{folder} is no evaluation: it has no {SAMPLES}; name the folder that `evaluate` wrote")
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
