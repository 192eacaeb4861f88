"""A blend: several sources with weights, caps on their epochs, and phases that change the weights during the run.

The schedule is fixed before the first step. Each phase's rows are shared out among its sources exactly (largest
remainder; what a capped source cannot give goes to the others by weight), then spread evenly: the m-th of a source's
c rows in a phase of N stands at the moment (m + 1/2) N / c, and rows follow each other by moment. So the rows of any
step are found without walking there, the running share of a source never strays further from its weight than there
are sources, and the table that `preview` prints is what will happen, to the token.

The phases of Nemotron Nano 2 (its report, section 2.3) end at 0.6, 0.9 and 1.0 of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from whimbrel.data.pack import Batch, Rows, join
from whimbrel.errors import UserError, nearest


@dataclass(frozen=True)
class Phase:
    """Weights that hold until a share of the run is over. They need not add up to 1."""

    until: float
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Portion:
    """One line of the schedule's table: what a source gives in a phase."""

    phase: int
    source: str
    rows: int
    tokens: int
    asked: float  # share of the phase by weight
    given: float  # share of the phase's rows
    epochs: float  # of the source, when the phase ends


@dataclass(frozen=True)
class _Stretch:
    """A phase, counted: slots [first, first + slots) of the run; source j gives counts_j rows from offsets_j on."""

    first: int
    slots: int
    counts: NDArray[np.int64]
    offsets: NDArray[np.int64]


@dataclass(frozen=True)
class Blend:
    """A run of `batches` batches, each of `batch_rows` rows of several sources; `batch(step)` is pure in the step.

    With gradient accumulation a batch is a micro-batch: batches = steps times micro-batches a step.
    """

    sources: Mapping[str, Rows]
    phases: Sequence[Phase]
    batch_rows: int
    batches: int
    epochs: Mapping[str, float] = field(default_factory=dict)  # a source without an entry repeats as often as needed
    _plan: tuple[_Stretch, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self)
        room = [self.epochs.get(name, math.inf) * rows.count for name, rows in self.sources.items()]
        plan, first, offsets = [], 0, np.zeros(len(self.sources), np.int64)
        for number, phase in enumerate(self.phases):
            slots = round(phase.until * self.batches) * self.batch_rows - first
            weights = [phase.weights.get(name, 0) for name in self.sources]
            left = [cap - used for cap, used in zip(room, offsets.tolist(), strict=True)]
            counts = apportion(slots, weights, left)
            if counts is None:
                capped = ", ".join(f"{name}={self.epochs[name]:g}" for name in phase.weights if name in self.epochs)
                raise UserError(
                    f"phase {number + 1} needs {slots} rows, its sources have fewer left under their epochs ({capped});"
                    " raise those, or set fewer batches"
                )
            plan.append(_Stretch(first, slots, np.asarray(counts), offsets))
            first, offsets = first + slots, offsets + np.asarray(counts)
        object.__setattr__(self, "_plan", tuple(plan))

    @property
    def length(self) -> int:
        """Rows of the whole run."""
        return self.batches * self.batch_rows

    def batch(self, step: int) -> Batch:
        """The batch of a step in [0, batches)."""
        assert 0 <= step < self.batches, f"batch {step} of a blend of {self.batches}"
        sources = list(self.sources.values())
        slot = step * self.batch_rows
        stretch = next(s for s in reversed(self._plan) if s.first <= slot and s.slots)
        which, rows = _slots(stretch, slot, slot + self.batch_rows)
        return join([sources[j].row(row) for j, row in zip(which.tolist(), rows.tolist(), strict=True)], step)

    def table(self) -> list[Portion]:
        """What each source gives in each phase, exactly."""
        lines = []
        for number, (phase, stretch) in enumerate(zip(self.phases, self._plan, strict=True)):
            total = sum(phase.weights.values())
            for j, (name, rows) in enumerate(self.sources.items()):
                start, count = int(stretch.offsets[j]), int(stretch.counts[j])
                tokens = rows.tokens_between(start, start + count)
                asked, given = phase.weights.get(name, 0) / total, count / max(stretch.slots, 1)
                lines.append(Portion(number, name, count, tokens, asked, given, (start + count) / rows.count))
        return lines

    def preview(self) -> str:
        """The table as text."""
        wide = max(6, *(len(name) for name in self.sources))
        head = f"phase  {'source':<{wide}}        rows           tokens   asked   given  epochs"
        lines = [
            f"{p.phase + 1:>5}  {p.source:<{wide}}  {p.rows:>10,}  {p.tokens:>15,}"
            f"  {p.asked:>6.2%}  {p.given:>6.2%}  {p.epochs:>6.2f}"
            for p in self.table()
        ]
        return "\n".join([head, *lines])


def apportion(slots: int, weights: Sequence[float], room: Sequence[float]) -> list[int] | None:
    """Whole numbers that add up to `slots`, in proportion to the weights, none above its room; None if room is short.

    room: rows left of each source, math.inf where there is no cap. Rounding by largest remainder, the first wins a tie.
    """
    exact = [Fraction(weight) for weight in weights]
    limits = [math.floor(cap) if math.isfinite(cap) else None for cap in room]
    counts, active, left = [0] * len(exact), [j for j, weight in enumerate(exact) if weight], slots
    while True:
        total = sum((exact[j] for j in active), Fraction(0))
        shares = {j: left * exact[j] / total for j in active}
        full = {j: cap for j in active if (cap := limits[j]) is not None and shares[j] > cap}
        if not full:
            break
        for j, cap in full.items():
            counts[j] = cap
            left -= cap
        active = [j for j in active if j not in full]
    if not active:
        return None if left else counts
    for j in active:
        counts[j] = math.floor(shares[j])
    short = left - sum(counts[j] for j in active)
    for j in sorted(active, key=lambda j: counts[j] - shares[j])[:short]:
        counts[j] += 1
    return counts


def _slots(stretch: _Stretch, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Source number and row index of the slots [start, stop) of the run, all inside the stretch."""
    start, stop = start - stretch.first, stop - stretch.first
    used = np.flatnonzero(stretch.counts)
    margin = len(stretch.counts) + 1  # the number of rows before a moment strays from it by less than this
    gap = stretch.slots / stretch.counts[used]
    low = np.clip(np.ceil((start - margin) / gap - 0.5), 0, stretch.counts[used]).astype(np.int64)
    high = np.clip(np.ceil((stop + margin) / gap - 0.5), 0, stretch.counts[used]).astype(np.int64)
    which = np.repeat(used, high - low)
    number = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
    moment = (number + 0.5) * (stretch.slots / stretch.counts[which])
    at = np.lexsort((which, moment))[start - low.sum() : stop - low.sum()]
    return which[at], number[at] + stretch.offsets[which[at]]


def _check(blend: Blend) -> None:
    if not blend.sources or blend.batch_rows < 1 or blend.batches < 1:
        raise UserError(
            f"a blend has {len(blend.sources)} sources, batch_rows {blend.batch_rows}, batches {blend.batches}; "
            "set each to 1 or more"
        )
    ends = [phase.until for phase in blend.phases]
    if not ends or ends[-1] != 1.0 or any(a >= b for a, b in zip([0.0, *ends], ends, strict=False)):
        raise UserError(f"the phases end at {ends}; set until to growing shares of the run, the last one 1.0")
    for name in [name for phase in blend.phases for name in phase.weights] + list(blend.epochs):
        if name not in blend.sources:
            raise UserError(f"the blend names a source {name!r}; {nearest(name, blend.sources)}")
    for phase in blend.phases:
        if any(not 0 <= w < math.inf for w in phase.weights.values()) or not sum(phase.weights.values()):
            raise UserError(f"weights are {dict(phase.weights)}; set them to numbers from 0 up, one of them above 0")
    for name, epochs in blend.epochs.items():
        if not epochs > 0:
            raise UserError(f"epochs of {name} is {epochs}; set it above 0")
