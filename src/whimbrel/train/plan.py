"""What training a model takes on each process, and how long: from its config alone, before anything is built.

Weights, gradients and moments are exact (the shapes of every cut); activations are the dry run of train/memory.py; time
is operations over peak times a share of it that the reader must believe (docs/plan.md has published ones).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from whimbrel.errors import UserError, nearest
from whimbrel.model import count
from whimbrel.model.config import ModelConfig
from whimbrel.model.language import LanguageModel
from whimbrel.parallel import Axes
from whimbrel.parallel.tensor import cuts, local_config
from whimbrel.train.memory import activation_bytes
from whimbrel.units import format_bytes, format_count

CHUNK = 1024
"""Rows of logits that the head's loss holds at a time (train/objective.py)."""
DAY = 86_400
BLOCK = 16
"""Tokens of a block of keys and values (the engine's default)."""
REFUSED: dict[str, tuple[str, ...]] = {
    "pretrain": (),
    "sft": (),
    "dpo": ("context",),
    "reward": ("context",),
    "grpo": ("context",),
}
"""Axes that a stage cannot use."""
NOTES = {
    "dpo": "  reference        its log-probabilities alone, computed before the first step",
    "grpo": "  drawing          is not in the time of a step",
}


@dataclass(frozen=True)
class TrainingPlanSettings:
    """What is to be planned besides the model, its rows and the machine."""

    tokens: float = 0.0
    """Of the whole run; 0: no days are given."""
    accumulate: int = 1
    """Micro-batches of a step, on all copies together."""
    recompute: bool = False
    """Activation checkpointing."""
    mfu: float = 0.35
    """Share of the peak that is reached (model FLOPs utilisation)."""
    causal: bool = True
    """Count the keys that a token sees; false counts the whole row, as Megatron's published MFU does."""
    parallel: Axes = field(default_factory=Axes)
    stage: str = "pretrain"
    """pretrain, sft, dpo, reward or grpo: what lies beside the model."""
    sequences: int = 0
    """grpo: answers that each process draws at once, groups × group_size over all processes."""
    reference: bool = False
    """grpo: a frozen reference lies beside the policy, as with any `kl`."""

    def __post_init__(self) -> None:
        if self.stage not in REFUSED:
            raise UserError(f"stage is {self.stage!r}; {nearest(self.stage, REFUSED)}")
        for axis in REFUSED[self.stage]:
            if getattr(self.parallel, axis) > 1:
                raise UserError(f"parallel.{axis} is not for {self.stage}; set parallel.{axis} to 1")
        if (self.sequences > 0) != (self.stage == "grpo") or self.reference > (self.stage == "grpo"):
            works = "the answers drawn at once, for example 64" if self.stage == "grpo" else "0 and reference to false"
            raise UserError(f"sequences is {self.sequences} with stage {self.stage}; set sequences to {works}")
        if self.tokens < 0 or not math.isfinite(self.tokens):
            raise UserError(f"tokens is {self.tokens}; set tokens to the length of the run, for example 8e12")
        if self.accumulate < 1:
            raise UserError(f"accumulate is {self.accumulate}; set accumulate to {self.parallel.copies}")
        if not 0 < self.mfu <= 1:
            raise UserError(f"mfu is {self.mfu}; set mfu in (0, 1], for example 0.35")
        if self.stage != "grpo":  # whose micro-batches are made of what was drawn
            self.parallel.check_batches(self.accumulate)


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes on each process, and times. Sizes in bytes, times in seconds."""

    model: str
    stage: str
    parameters: int
    processes: int
    axes: dict[str, int]
    tokens_per_step: int
    memory: int
    weights_bytes: int
    gradients_bytes: int
    moments_bytes: int
    gathered_bytes: int
    """With `fsdp`: two units of whole weights and one of whole gradients, while they are computed."""
    activation_bytes: int
    other_activation_bytes: int
    """What they would be with the other setting of `recompute`."""
    logits_bytes: int
    reference_bytes: int
    """The weights of a frozen reference."""
    drawer_bytes: int
    """Whole weights that the engine has of its own, where the model is cut."""
    engine_bytes: int
    """Keys, values and recurrent states of the answers that are drawn."""
    reserve_bytes: int
    total_bytes: int
    fits: bool
    recompute: bool
    flops_per_token: float
    """Forward and back, without what is computed again."""
    run_flops: float | None
    peak: float
    """FLOP/s of one process's device."""
    mfu: float
    step_seconds: float
    least_step_seconds: float
    """The same at the whole peak: the floor."""
    tokens_per_second: float
    days: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The plan for people."""
        product = " × ".join(f"{name} {size}" for name, size in self.axes.items() if size > 1) or "alone"
        head = f"{self.model}: {format_count(self.parameters)} parameters, trained by {self.processes:,} ({product})"
        head += f", {self.stage}" * (self.stage != "pretrain")
        rows = [
            ("weights", self.weights_bytes, "float32, on each"),
            ("gradients", self.gradients_bytes, "float32"),
            ("moments", self.moments_bytes, "AdamW's two, float32"),
            ("gathered", self.gathered_bytes, "whole layers while FSDP computes them"),
            ("activations", self.activation_bytes, self._activations()),
            ("logits", self.logits_bytes, "of a chunk of rows, and their gradient"),
            ("reference", self.reference_bytes, "frozen weights, float32"),
            ("drawer", self.drawer_bytes, "the engine's own weights, whole, float32"),
            ("engine", self.engine_bytes, "keys, values and states of the answers that are drawn"),
            ("reserve", self.reserve_bytes, "kept free"),
        ]
        lines = [f"  {name:<16} {format_bytes(size):>11}  {what}" for name, size, what in rows if size]
        spare = self.memory - self.total_bytes
        verdict = (
            f"fits, {format_bytes(spare)} to spare" if self.fits else f"does not fit, {format_bytes(-spare)} too much"
        )
        lines.append(f"  {'total':<16} {format_bytes(self.total_bytes):>11}  of {format_bytes(self.memory)}: {verdict}")
        note = [NOTES[self.stage]] if self.stage in NOTES else []
        return [head, "", *lines, "", *self._times(), *note]

    def _activations(self) -> str:
        now, other = ("recomputed", "without") if self.recompute else ("kept", "with")
        return f"{now}; {format_bytes(self.other_activation_bytes)} {other} recompute"

    def _times(self) -> list[str]:
        step, peak = format_count(self.tokens_per_step), f"{self.peak / 1e12:,.4g} TFLOP/s"
        lines = [
            f"  a step           {step} tokens in {self.step_seconds:,.3g} s at {self.mfu:.1%} of {peak}; "
            f"{self.least_step_seconds:,.3g} s at all of it",
            f"  together         {format_count(self.tokens_per_second)} tokens/s",
        ]
        if self.days is not None and self.run_flops is not None:
            lines.append(f"  the run          {self.days:,.3g} days, {self.run_flops:.3g} operations")
        return lines


def plan(
    config: ModelConfig,
    settings: TrainingPlanSettings,
    *,
    length: int,
    rows: int,
    memory: int,
    peak: float,
    precision: str = "bfloat16",
    reserve: int = 0,
    name: str = "model",
) -> TrainingPlan:
    """Plan training on micro-batches of `rows` rows of `length` tokens; `memory` and `peak` are one process's.

    Raises UserError for axes that do not fit the model.
    """
    (axes := settings.parallel).check_model(config)
    if length < 1 or rows < 1:
        raise UserError(f"context is {length}, batch {rows}; set both to 1 or more, for example 8192 and 1")
    tokens = rows * length
    parts, other = _parts(config, settings, length, rows, precision)
    parts["reserve_bytes"] = reserve
    flops = count.flops_per_token(config, count.mean_context([length]) if settings.causal else length, training=True)
    step, total = tokens * settings.accumulate, sum(parts.values())
    least = flops * step / (axes.processes * peak)
    rate = step / least * settings.mfu
    return TrainingPlan(
        model=name,
        stage=settings.stage,
        parameters=count.total(config),
        processes=axes.processes,
        axes=asdict(axes),
        tokens_per_step=step,
        memory=memory,
        other_activation_bytes=other,
        total_bytes=total,
        fits=total <= memory,
        recompute=settings.recompute,
        flops_per_token=flops,
        run_flops=flops * settings.tokens if settings.tokens else None,
        peak=peak,
        mfu=settings.mfu,
        step_seconds=least / settings.mfu,
        least_step_seconds=least,
        tokens_per_second=rate,
        days=settings.tokens / rate / DAY if settings.tokens else None,
        **parts,
    )


def _parts(
    config: ModelConfig, settings: TrainingPlanSettings, length: int, rows: int, precision: str
) -> tuple[dict[str, int], int]:
    """Bytes of each part on a process, and what activations are with the other setting of `recompute`."""
    axes, tokens = settings.parallel, rows * length
    (weights, largest), small = held_bytes(config, axes), local_config(config, axes.tensor)
    lengths, rest = [length] * (rows // axes.context), rows % axes.context * length // axes.context
    shape = (small, [*lengths, *[rest] * (rest > 0)], getattr(torch, precision))
    kept = {on: activation_bytes(*shape, on) for on in (True, False)}
    return {
        "weights_bytes": weights,
        "gradients_bytes": weights,
        "moments_bytes": 2 * weights,
        "gathered_bytes": 3 * largest * (axes.fsdp > 1),
        "activation_bytes": kept[settings.recompute],
        "logits_bytes": 2
        * min(CHUNK, -(-tokens // axes.context))
        * small.vocab_size
        // axes.tensor
        * count.FLOAT32
        * (settings.stage != "reward"),
        "reference_bytes": weights * settings.reference,
        "drawer_bytes": count.total(config)
        * count.FLOAT32
        * (settings.stage == "grpo" and axes.fsdp * axes.tensor > 1),
        "engine_bytes": _engine_bytes(config, settings.sequences, length),
    }, kept[not settings.recompute]


def _engine_bytes(config: ModelConfig, sequences: int, length: int) -> int:
    """What sequences of `length` tokens hold in an engine on the same float32 weights."""
    states = count.state_bytes(config, sequences, "float32")
    return states + count.kv_bytes(config, -(-length // BLOCK) * BLOCK, sequences, "float32")


def held_bytes(config: ModelConfig, axes: Axes) -> tuple[int, int]:
    """float32 bytes of the weights on the rank that holds most, and of the largest unit that FSDP makes whole."""
    table = cuts(config)
    held, units = 0, dict[str, int]()
    for name, parameter in LanguageModel(config, device="meta").named_parameters():
        shape = list(parameter.shape)
        if name in table:
            shape[table[name].dim] //= axes.tensor
        whole = math.prod(shape)
        held += -(-shape[0] // axes.fsdp) * (whole // shape[0])
        unit = ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])
        units[unit] = units.get(unit, 0) + whole
    return held * count.FLOAT32, max(units.values()) * count.FLOAT32
