"""A stage that trains the small hybrid, and can be hurt on one of its processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from small import HYBRID, Packed, Rows, model

from whimbrel.errors import UserError
from whimbrel.events import Report
from whimbrel.pipeline.stages import LOOP, Stage
from whimbrel.train.loop import TrainSettings, pretrain


@dataclass(frozen=True)
class FlockSettings:
    """The loop's, and what goes wrong on the second process in the third step."""

    train: TrainSettings = field(default_factory=TrainSettings)
    trouble: str = ""


@dataclass(frozen=True)
class Hurt(Rows):
    """Rows, one of which is trouble."""

    trouble: str = ""

    def batch(self, index: int) -> Packed:
        """The batch of an index."""
        if self.trouble and index >= 2 * 4 and os.environ.get("RANK") == "1":
            if self.trouble == "user":
                raise UserError("row 9 is torn; set heldout to rows that are whole")
            if self.trouble == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the wheel came off")
        return super().batch(index)


def run(settings: FlockSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Train, and save."""
    made = model(HYBRID)
    figures = pretrain(settings.train, Hurt(0, settings.trouble), None, made, out, report)
    made.save(out / "model")
    return figures


def alone(settings: FlockSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """A stage of one process."""
    raise AssertionError


TABLE = {
    name: Stage(
        settings="flock:FlockSettings",
        run=f"flock:{name}",
        version=1,
        inputs=(),
        model="model",
        free=(*LOOP, "trouble"),
        spread=name == "run",
    )
    for name in ("run", "alone")
}
