"""What several ranks compute against what one computes: `equal.py OUT`, run by every rank; OUT gets one JSON file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from small import CLASSIC, HYBRID, Rows, model

from whimbrel.compress.distill import Distillation
from whimbrel.model.config import ModelConfig
from whimbrel.model.language import LanguageModel
from whimbrel.parallel import Axes, Share, applied, local
from whimbrel.parallel import gradients as sums
from whimbrel.parallel.pieces import parts
from whimbrel.parallel.tensor import cuts
from whimbrel.train.objective import CrossEntropy
from whimbrel.train.optimizer import OptimizerSettings, adamw
from whimbrel.train.plan import held_bytes
from whimbrel.train.step import accumulate, train_step

MICRO = 8
TOLERANCE = 1e-5
"""Of weights after two steps of 1e-3."""
CASES = {
    2: [{"data": 2}, {"fsdp": 2}, {"context": 2}, {"tensor": 2}],
    4: [
        {"fsdp": 2, "tensor": 2},
        {"data": 2, "context": 2},
        {"context": 2, "tensor": 2},
        {"context": 4},
    ],
}


Tensors = dict[str, torch.Tensor]


def worst(mine: Tensors, whole: Tensors, config: ModelConfig, share: Share, left_out: Tensors | None = None) -> Any:
    """The largest |difference| - 1e-6 |value| of what lies here, and where; `left_out` says what is not looked at."""
    table, found = cuts(config), (0.0, "")
    for name, tensor in mine.items():
        for part in parts(tensor, table.get(name), share):
            if part.tensor.numel():
                place = tuple(slice(a, a + n) for a, n in zip(part.offset, part.tensor.shape, strict=True))
                wanted = whole[name][place]
                assert wanted.shape == part.tensor.shape, name
                off = (part.tensor - wanted).abs() - 1e-6 * wanted.abs()
                if left_out is not None:
                    off = off.masked_fill(left_out[name][place], 0.0)
                found = max(found, (off.max().item(), name))
    return found


def two_steps(made: LanguageModel, batches: list[Any], clip: float) -> tuple[Watch, torch.optim.AdamW]:
    """Move the weights twice; returns the clipped gradients of each step, and the optimizer."""
    watch = Watch()
    adam = watch.adamw(made, OptimizerSettings())
    for _ in range(2):
        train_step(made, CrossEntropy(), batches, adam, clip=clip)
    return watch, adam


def moments(made: LanguageModel, adam: torch.optim.AdamW, name: str) -> Tensors:
    """One of AdamW's moments by parameter."""
    return {n: adam.state[p][name] for n, p in made.named_parameters()}


@dataclass
class Watch:
    """The gradients that optimizers are given, as they lie here, and the rate of each step."""

    steps: list[tuple[Tensors, float]] = field(default_factory=list)

    def adamw(self, made: LanguageModel, settings: OptimizerSettings) -> torch.optim.AdamW:
        """In the place of `optimizer.adamw`."""
        adam = adamw(made, settings)
        adam.register_step_pre_hook(lambda *_: self._note(made, adam))
        return adam

    def _note(self, made: LanguageModel, adam: torch.optim.AdamW) -> None:
        held = {n: local(p.grad).clone() for n, p in made.named_parameters() if p.grad is not None}
        self.steps.append((held, adam.param_groups[0]["lr"]))


def moved(gradients: Sequence[torch.Tensor], rates: Sequence[float]) -> torch.Tensor:
    """What AdamW takes from a weight in these steps, without decay."""
    how, total = OptimizerSettings(), torch.zeros_like(gradients[0])
    mean, square = torch.zeros_like(total), torch.zeros_like(total)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        mean = how.beta1 * mean + (1 - how.beta1) * gradient
        square = how.beta2 * square + (1 - how.beta2) * gradient.square()
        root = (square / (1 - how.beta2**step)).sqrt()
        total = total + rate * mean / (1 - how.beta1**step) / (root + how.eps)
    return total


def undecided(rounded: Watch, exact: Watch, tolerance: float) -> Tensors:
    """Which weights float32 alone decides: AdamW divides a gradient by its own size, so that of one that is nearly
    nothing the rounding is what counts. `rounded` and `exact` are what one rank computes in float32 and in float64; the
    root of their mean squared distance is the rounding of a row in a step. An entry is left out if four times that
    in either of two runs can move the weight by more than `tolerance` between them.
    """
    rates, left_out = [rate for _, rate in exact.steps], Tensors()
    for name in exact.steps[0][0]:
        true = [held[name] for held, _ in exact.steps]
        away = [4 * (held[name] - one).square().mean(-1, keepdim=True).sqrt()
                for (held, _), one in zip(rounded.steps, true, strict=True)]  # fmt: skip
        still, far = moved(true, rates), torch.zeros_like(true[0])
        for signs in product((-1, 1), repeat=len(rates)):
            other = moved([one + sign * off for one, sign, off in zip(true, signs, away, strict=True)], rates)
            far = torch.maximum(far, (other - still).abs())
        left_out[name] = 2 * far > tolerance
    return left_out


def share_of(left_out: Tensors) -> float:
    """Of all weights."""
    return sum(int(one.sum()) for one in left_out.values()) / sum(one.numel() for one in left_out.values())


def taught(config: ModelConfig, axes: Axes) -> dict[str, Any]:
    """Distillation by a whole teacher on every rank, and logits of all the vocabulary."""
    alone, spread, teacher = model(config), model(config), model(config, seed=3)
    batches = [Rows(2).batch(i) for i in range(2)]
    objective = Distillation(teacher, labels=0.25)
    loss, terms = accumulate(alone, objective, batches, learn=True)
    assert terms["kl"] > 0.01
    wanted = {name: p.grad.clone() for name, p in alone.named_parameters() if p.grad is not None}
    tokens_BL = torch.arange(24).view(2, 12)
    with applied(spread, axes) as share:
        seen, _ = accumulate(spread, objective, batches, learn=True)
        sums.finish(spread, share)
        off = worst({n: p.grad for n, p in spread.named_parameters() if p.grad is not None}, wanted, config, share)
        logits = (spread(tokens_BL) - alone(tokens_BL)).abs().max().item()
        everywhere = share.collect({"loss": abs(seen - loss), "gradient": off, "logits": logits})
    return {key: max(one[key] for one in everywhere) for key in everywhere[0]}


def case(config: ModelConfig, axes: Axes, recompute: bool) -> dict[str, Any]:
    """Loss, gradients, their norm, and moments and weights after two clipped steps."""
    alone, spread, source = model(config), model(config), Rows()
    batches = [source.batch(i) for i in range(MICRO)]
    loss, _ = accumulate(alone, CrossEntropy(), batches, learn=True)
    wanted = {name: p.grad.clone() for name, p in alone.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(wanted.values())).item()
    alone.zero_grad()
    rounded, adam = two_steps(alone, batches, norm / 3)
    left_out = undecided(rounded, two_steps(model(config).double(), batches, norm / 3)[0], TOLERANCE)
    with applied(spread, axes, recompute=recompute) as share:
        own = [batches[i] for i in share.mine(MICRO)]
        seen, _ = accumulate(spread, CrossEntropy(), own, learn=True)
        sums.finish(spread, share)
        here = {name: p.grad for name, p in spread.named_parameters() if p.grad is not None}
        off = worst(here, wanted, config, share)
        found = {"loss": abs(seen - loss), "gradient": off, "norm": abs(sums.norm(spread, share).item() / norm - 1)}
        spread.zero_grad()
        _, other = two_steps(spread, own, norm / 3)
        after = worst(dict(spread.named_parameters()), dict(alone.named_parameters()), config, share, left_out)
        for moment in ("exp_avg", "exp_avg_sq"):
            found[moment] = worst(moments(spread, other, moment), moments(alone, adam, moment), config, share)
        held = sum(local(p).nbytes for p in spread.parameters())
        everywhere = share.collect(found | {"weights": after, "same": sorted(here) == sorted(wanted), "held": held})
    return {key: max(one[key] for one in everywhere) for key in found} | {
        "left_out": share_of(left_out),
        "weights": max(one["weights"] for one in everywhere),
        "held": [max(one["held"] for one in everywhere), held_bytes(config, axes)[0]],
        "same": all(one["same"] for one in everywhere),
    }


def main(out: Path) -> None:
    """Every case of this number of ranks."""
    torch.set_num_threads(1)
    results = {}
    for number, axes in enumerate(CASES[int(os.environ["WORLD_SIZE"])]):
        for name, config in (("hybrid", HYBRID), ("classic", CLASSIC)):
            results[f"{name} {axes}"] = case(config, Axes(**axes), recompute=number % 2 == 1)
    if os.environ["WORLD_SIZE"] == "2":
        for axes in ({"tensor": 2}, {"context": 2}):
            for name, config in (("hybrid", HYBRID), ("classic", CLASSIC)):
                results[f"taught {name} {axes}"] = taught(config, Axes(**axes))
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(results, indent=1))


assert set(asdict(Axes())) == {"data", "fsdp", "context", "tensor"}
if __name__ == "__main__":
    main(Path(sys.argv[1]))
