"""Which smaller shape: all that fit, ranked by what they keep, then by the loss after the cut, then by a short life.

From configs alone, so that the shapes under a memory are known before anything is loaded or cut. The way is that of
Nemotron Nano 2 (arXiv 2508.14444, section 4) and MiniPuzzle (arXiv 2504.03624): layers go in a fixed order, widths are
the same in all layers, every shape of the grid that fits is a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

from whimbrel.compress.importance import blocks
from whimbrel.engine.plan import serving_bytes
from whimbrel.errors import UserError
from whimbrel.model import count
from whimbrel.model.config import ATTENTION, FEED_FORWARD, MAMBA, ModelConfig
from whimbrel.units import format_bytes, format_count

GRID = {"layers": 0.8, "hidden_size": 0.5, "intermediate_size": 0.5, "mamba_num_heads": 0.5}
"""Axes that are cut where no values are given, each with the least share of the parent that is tried."""
PARTS = {
    ("hidden_size",): "",
    ("intermediate_size",): FEED_FORWARD,
    ("mamba_num_heads",): MAMBA,
    ("mamba_head_dim",): MAMBA,
    ("num_key_value_heads", "num_attention_heads"): ATTENTION,
}
"""Widths that can be cut alone, and the letter they belong to."""


@dataclass(frozen=True)
class Axes:
    """Values to try on each axis; null: a grid from the parent downwards for layers, width, feed-forward and Mamba
    heads, the parent's value alone for the others.
    """

    layers: tuple[int, ...] | None = None
    """Layers that stay."""
    hidden_size: tuple[int, ...] | None = None
    intermediate_size: tuple[int, ...] | None = None
    mamba_num_heads: tuple[int, ...] | None = None
    """Multiples of the groups: every group keeps as many."""
    mamba_head_dim: tuple[int, ...] | None = None
    num_key_value_heads: tuple[int, ...] | None = None
    num_attention_heads: tuple[int, ...] | None = None
    """Query heads; null: those of the key/value heads that stay."""

    def values(self, parent: ModelConfig) -> dict[str, tuple[int, ...]]:
        """The values of every axis of this parent, the largest first. `UserError` for those that no cut can give."""
        steps = {"layers": len(blocks(parent)[0]), "mamba_num_heads": parent.n_groups}
        grid = {name: _grid(getattr(parent, name), steps.get(name, 1), least) for name, least in GRID.items()}
        absent = {name for part, letter in PARTS.items() if letter not in parent.pattern for name in part}
        kinds = len(set(parent.pattern))
        grid["layers"] = tuple(n for n in grid["layers"] if n >= kinds)
        found: dict[str, tuple[int, ...]] = {}
        for name, given in vars(self).items():
            most, step = getattr(parent, name), steps.get(name, 1)
            if name in absent:
                found[name] = (most,)
                continue
            for value in given or ():
                least = max(step, kinds) if name == "layers" else step
                if not least <= value <= most or value % step:
                    raise UserError(
                        f"axes.{name} has {value}; set it to multiples of {step} from {least} to the parent's {most}"
                    )
            found[name] = tuple(sorted(set(given or grid.get(name, (most,))), reverse=True))
        return found


def _grid(most: int, step: int, least: float) -> tuple[int, ...]:
    """Sixteenths of the parent's value from all of it down to the share `least`, in whole steps."""
    return tuple({step * max(1, most // step * n // 16) for n in range(math.ceil(16 * least), 17)})


@dataclass(frozen=True)
class Bound:
    """What a child may take: bytes while it serves `batch` sequences of `context` tokens, and parameters."""

    memory: int | None = None
    context: int = 1
    batch: int = 1
    dtype: str = "bfloat16"
    parameters: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One shape, and what became of it so far. Losses are cross-entropy on held-out text."""

    config: ModelConfig
    layers: tuple[int, ...]
    """Layers of the parent that stay."""
    parameters: int
    bytes: int
    """While serving at the bound's context."""
    estimate: float = math.nan
    """The parent's loss and what each axis, cut alone, adds to it: the order in which to look."""
    cut_loss: float = math.nan
    """Right after the cut."""
    trial_loss: float = math.nan
    """After a short distillation."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The value on each axis."""
        return tuple(getattr(self.config, axis.name) for axis in fields(Axes))

    @property
    def name(self) -> str:
        """The shape as a word."""
        return "-".join(map(str, self.shape))

    @property
    def losses(self) -> tuple[float, float, float]:
        """What is known of it, the best known first; NaN is not known."""
        return self.trial_loss, self.cut_loss, self.estimate


def candidates(parent: ModelConfig, stay: Mapping[int, tuple[int, ...]], axes: Axes, bound: Bound) -> list[Candidate]:
    """Every shape of the grid that the bound holds, the largest first. `stay`: what `importance.depths` gives.

    Raises `UserError` with the memory or share that would do if there is none.
    """
    names, *grid = zip(*axes.values(parent).items(), strict=True)
    queries = parent.num_attention_heads // max(1, parent.num_key_value_heads)
    found, least_bytes, least_parameters = [], 1 << 62, 1 << 62
    for layers, *widths in product(*grid[0]):
        named = dict(zip(names[1:], widths, strict=True))
        keys = named["num_key_value_heads"]
        if axes.num_attention_heads is None:
            named["num_attention_heads"] = keys * queries
        each, rest = divmod(named["num_attention_heads"], max(1, keys))
        if rest or each > queries:  # every key/value head keeps as many query heads, of those it has
            continue
        pattern = "".join(parent.pattern[layer] for layer in stay[layers])
        config = replace(parent, pattern=pattern, **named)
        parameters, bytes_ = count.total(config), serving_bytes(config, bound.context, bound.batch, bound.dtype)
        least_bytes, least_parameters = min(least_bytes, bytes_), min(least_parameters, parameters)
        if bytes_ <= (bound.memory or bytes_) and parameters <= (bound.parameters or parameters):
            found.append(Candidate(config, stay[layers], parameters, bytes_))
    if not found:
        raise UserError(_nothing(bound, count.total(parent), least_bytes, least_parameters))
    return sorted(found, key=lambda one: -one.parameters)


def _nothing(bound: Bound, parent: int, bytes_: int, parameters: int) -> str:
    """What to say when not even the smallest shape is within the bound."""
    said = f"the smallest shape of the grid takes {format_bytes(bytes_)} and has {format_count(parameters)} parameters"
    ways = [] if bound.memory is None else [f"memory to {math.ceil(bytes_ / 2**20)}MiB"]
    ways += [] if bound.parameters is None else [f"share to {math.ceil(1000 * parameters / parent) / 1000:g}"]
    return f"nothing fits: {said}; set {' and '.join(ways)}, or give smaller values under axes"


def largest(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other is at least as large as on every axis: to take less than fits is to lose for nothing."""
    kept: list[Candidate] = []
    for one in sorted(found, key=lambda one: -one.parameters):
        if not any(all(a <= b for a, b in zip(one.shape, other.shape, strict=True)) for other in kept):
            kept.append(one)
    return kept


def estimated(
    parent: ModelConfig, found: Sequence[Candidate], loss: Callable[[ModelConfig, tuple[int, ...]], float]
) -> list[Candidate]:
    """Candidates with their estimates, the least first. `loss`: of the child of a shape with these layers."""
    known: dict[ModelConfig, float] = {}
    everything = tuple(range(parent.layers))
    made = []
    for one in found:
        alone = [(replace(parent, pattern=one.config.pattern), one.layers)]
        alone += [(replace(parent, **{name: getattr(one.config, name) for name in part}), everything) for part in PARTS]
        for config, layers in [(parent, everything), *alone]:
            if config not in known:
                known[config] = loss(config, layers)
        made.append(replace(one, estimate=known[parent] + sum(known[config] - known[parent] for config, _ in alone)))
    return sorted(made, key=lambda one: one.estimate)


def choose(
    found: Sequence[Candidate],
    scored: int,
    finalists: int,
    cut_loss: Callable[[Candidate], float],
    trial_loss: Callable[[Candidate], float],
) -> list[Candidate]:
    """The candidates with what was found out about them, the chosen one first.

    Of every depth the `scored / depths` of least estimate are cut and scored. The best of each depth are tried, which
    settles the depth; then the next of that depth, `finalists` with the first. 1 finalist of one depth is not tried.
    """
    seen = {one.name: one for one in found}
    field: dict[int, list[Candidate]] = {}
    for one in sorted(found, key=lambda one: one.estimate):
        field.setdefault(len(one.layers), []).append(one)
    for depth, some in field.items():
        looked = [replace(one, cut_loss=cut_loss(one)) for one in some[: -(-scored // len(field))]]
        field[depth] = sorted(looked, key=lambda one: one.cut_loss)
        seen |= {one.name: one for one in looked}

    def tried(some: Sequence[Candidate]) -> Candidate:
        if len(some) == 1:
            return some[0]
        for one in some:
            if math.isnan(seen[one.name].trial_loss):
                seen[one.name] = replace(one, trial_loss=trial_loss(one))
        return min((seen[one.name] for one in some), key=lambda one: one.trial_loss)

    depth = len(tried([some[0] for some in field.values()]).layers)
    winner = tried(field[depth][:finalists])
    known = {one.name: [math.inf if math.isnan(x) else x for x in one.losses] for one in seen.values()}
    return sorted(seen.values(), key=lambda one: (one is not winner, known[one.name]))


def table(found: Sequence[Candidate]) -> list[str]:
    """Candidates for people, one line each."""
    heads = ("layers", "width", "feed-fwd", "M heads", "M width", "kv heads", "heads")
    tail = ("parameters", "memory", "estimate", "cut loss", "trial loss")
    lines = ["  ".join([*(f"{head:>8}" for head in heads), *(f"{head:>10}" for head in tail)])]
    for one in found:
        losses = ("-" if math.isnan(x) else f"{x:.3f}" for x in reversed(one.losses))
        told = (format_count(one.parameters), format_bytes(one.bytes), *losses)
        lines.append("  ".join([*(f"{n:>8}" for n in one.shape), *(f"{word:>10}" for word in told)]))
    return lines
