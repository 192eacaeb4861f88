"""What a recipe claims, held against what its stages measured. The report shows every claim, met or missed.

    claims:
      - {say: thinking helps, of: eval-sft.sums.think.accuracy, minus: eval-sft.sums.off.accuracy, least: 0.2}
      - {say: the child is small, of: distill.probe.shape.parameters, over: merge.probe.shape.parameters, most: 0.65}

`of`, `minus` and `over` are paths: a stage, then keys of its metrics, or of its manifest. The last two are optional.
`run.minutes` and `run.gibibytes` are the time of all stages together and the most memory that one of them took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import model_validator

from whimbrel.config import Settings
from whimbrel.errors import UserError

WHOLE = "run"
"""What stands for a whole run in a path; no stage can have this name."""


class Claim(Settings):
    """One claim of a recipe."""

    say: str
    of: str
    minus: str | None = None
    over: str | None = None
    least: float | None = None
    most: float | None = None
    unit: Literal["", "%", "points"] = ""
    """Figure and bound are shares, to be shown in percent, or differences of shares, in points."""

    @model_validator(mode="after")
    def _bounded(self) -> Claim:
        if (self.least is None) == (self.most is None):
            raise UserError(f"claims: {self.say!r} needs either least or most; set one of them")
        return self

    @property
    def stages(self) -> set[str]:
        """Names of the stages that the paths begin with."""
        return {path.partition(".")[0] for path in (self.of, self.minus, self.over) if path is not None} - {WHOLE}


def held(claims: Sequence[Claim], made: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each claim with its `figure` and whether it was `met`; figure None where a stage measured no such thing."""
    seconds, memory = ([one[name] for one in made.values()] for name in ("wall_seconds", "peak_memory_bytes"))
    whole = {"minutes": sum(seconds) / 60, "gibibytes": max(memory, default=0) / 2**30}
    return [_held(claim, {**made, WHOLE: {"metrics": whole}}) for claim in claims]


def _held(claim: Claim, made: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    value = _look(made, claim.of)
    for path, join in ((claim.minus, lambda a, b: a - b), (claim.over, lambda a, b: a / b if b else None)):
        other = None if path is None else _look(made, path)
        value = value if path is None else None if value is None or other is None else join(value, other)
    met = value is not None and (value >= claim.least if claim.least is not None else value <= (claim.most or 0.0))
    bound = claim.least if claim.least is not None else claim.most
    return {"say": claim.say, "figure": value, "bound": bound, "at_least": claim.least is not None,
            "met": met, "unit": claim.unit}  # fmt: skip


def _look(made: Mapping[str, Mapping[str, Any]], path: str) -> float | None:
    stage, *keys = path.split(".")
    for place in (made.get(stage, {}).get("metrics"), made.get(stage)):
        for key in keys:
            place = place.get(key) if isinstance(place, Mapping) else None
        if isinstance(place, int | float):
            return float(place)
    return None
