"""The learning rate as a pure function of the step: warm-up, stable, decay (WSD), and cosine as its special case.

WSD: MiniCPM (arXiv 2404.06395); the recipe of Nemotron-H and Nemotron Nano 2 (arXiv 2508.14444: stable, then
decay over the last 18 % of the tokens to a hundredth). The shape `1-sqrt`: Hägele et al., arXiv 2405.18392.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from whimbrel.errors import UserError, nearest

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
"""Share of the way from the floor to the peak that is left, by the share of the decay that is done."""

KINDS = ("wsd", "cosine")


@dataclass(frozen=True)
class ScheduleSettings:
    """How the learning rate moves between 0, its peak and its floor."""

    kind: str = "wsd"
    """`wsd`: warm-up, stable, decay. `cosine`: warm-up, then one cosine to the end."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up; the first step already moves."""
    decay_share: float = 0.2
    """Share of all steps that decay at the end (`wsd` only); 0: the rate stays at its peak."""
    decay_shape: str = "1-sqrt"
    """`linear`, `cosine` or `1-sqrt` (`wsd` only)."""
    floor: float = 0.01
    """Learning rate of the last step, as a share of the peak."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"schedule.kind is {self.kind!r}; {nearest(self.kind, KINDS)}; set schedule.kind to wsd or cosine"
            )
        if self.decay_shape not in SHAPES:
            hint = nearest(self.decay_shape, SHAPES)
            raise UserError(f"schedule.decay_shape is {self.decay_shape!r}; {hint}; set it to linear, cosine or 1-sqrt")
        if self.warmup_steps < 0:
            raise UserError(f"schedule.warmup_steps is {self.warmup_steps}; set it to 0 or more")
        for name in ("decay_share", "floor"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"schedule.{name} is {getattr(self, name)}; set it between 0 and 1")

    def check(self, steps: int) -> None:
        """Raise `UserError` if warm-up and decay do not both fit into `steps`."""
        decay = 0 if self.kind == "cosine" else self.decay_steps(steps)
        if self.warmup_steps + decay > steps:
            raise UserError(
                f"schedule.warmup_steps {self.warmup_steps} and {decay} steps of decay do not fit into {steps} steps; "
                f"set schedule.warmup_steps to {steps - decay} or less"
            )

    def decay_steps(self, steps: int) -> int:
        """Optimizer steps of decay at the end of a run of `steps`."""
        return steps - self.warmup_steps if self.kind == "cosine" else round(self.decay_share * steps)

    def share(self, step: int, steps: int) -> float:
        """Learning rate of update number `step` (0 ... steps - 1), as a share of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        decay = self.decay_steps(steps)
        into = step + 1 - (steps - decay)
        if into <= 0:
            return 1.0
        shape = SHAPES["cosine" if self.kind == "cosine" else self.decay_shape]
        return self.floor + (1.0 - self.floor) * shape(into / decay)
