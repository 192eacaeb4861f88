"""Figures of an evaluation from its samples: `results.json` is made of `samples.jsonl` and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from whimbrel.errors import UserError
from whimbrel.evaluate import statistics
from whimbrel.evaluate.runner import DOWN, OUTCOMES, well_formed

Sample = Mapping[str, Any]
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
    if "strict" in made[0]:
        found["instructions"] = _instructions([sample for sample in made if "strict" in sample])
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

    def figure(value: Callable[[Sequence[Sample]], float]) -> statistics.Figure:
        values = [{"cluster": group[0]["cluster"], "value": value(group)} for group in whole]
        return share(values, lambda row: row["value"])

    sizes = sorted({k, *(2**power for power in range(k.bit_length()) if 2**power <= k)})
    found: dict[str, Any] = {"k": k}
    found["pass_at"] = {
        str(size): figure(lambda group, size=size: statistics.pass_at(int(sum(map(right, group))), k, size))  # type: ignore[misc]
        for size in sizes
    }
    if any(sample["extracted"] is not None for group in whole for sample in group):
        found["majority"] = figure(lambda g: statistics.majority([s["extracted"] for s in g], [right(s) for s in g]))
    return found


def _instructions(samples: Sequence[Sample]) -> dict[str, statistics.Figure]:
    """IFEval's four figures: all instructions of a prompt, or each for itself; strictly, or in one of eight forms."""
    found = {}
    for mode in ("strict", "loose"):
        verdicts = [sample[mode] for group in _by(samples, "cluster").values() for sample in group]
        found[f"prompt_{mode}"] = statistics.share([[float(all(each))] for each in verdicts])
        found[f"instruction_{mode}"] = statistics.share([[float(one) for one in each] for each in verdicts])
    return found


def summary(samples: Sequence[Sample]) -> dict[str, list[dict[str, Any]]]:
    """For each task its figures under each budget, in the order in which they were asked for: the budget's curve."""
    return {
        str(name): [{"budget": budget, **figures(group)} for budget, group in _by(of_task, "budget").items()]
        for name, of_task in _by(samples, "task").items()
    }


def compared(before: Sequence[Sample], after: Sequence[Sample]) -> dict[str, list[dict[str, Any]]]:
    """The paired comparison of two evaluations, by task and budget, on the problems that both have answers to."""
    old, new = (
        {
            place: {name: sum(map(right, one)) / len(one) for name, one in _by(group, "cluster").items()}
            for place, group in _by([s for s in samples if s["outcome"] != DOWN], "task", "budget").items()
        }
        for samples in (before, after)
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for place, means in new.items():
        both = [name for name in means if name in old.get(place, ())]
        if both:
            assert isinstance(place, tuple)
            task, budget = place
            pair = statistics.paired([old[place][name] for name in both], [means[name] for name in both])
            found.setdefault(task, []).append({"budget": budget, **pair})
    return found


def read_samples(folder: Path) -> list[Sample]:
    """The samples of an evaluation's folder; `UserError` if it is none."""
    path = folder / SAMPLES
    if not path.is_file():
        raise UserError(f"{folder} is no evaluation: it has no {SAMPLES}; name the folder that `evaluate` wrote")
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
