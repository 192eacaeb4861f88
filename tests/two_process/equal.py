"""What several ranks compute against what one computes: `equal.py OUT`, run by every rank; OUT gets one JSON file."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from small import CLASSIC, HYBRID, Rows, model

from whimbrel.compress.distill import Distillation
from whimbrel.model.config import ModelConfig
from whimbrel.parallel import Axes, Share, applied, local
from whimbrel.parallel import gradients as sums
from whimbrel.parallel.pieces import parts
from whimbrel.parallel.tensor import cuts
from whimbrel.train.objective import CrossEntropy
from whimbrel.train.optimizer import OptimizerSettings, adamw
from whimbrel.train.plan import held_bytes
from whimbrel.train.step import accumulate, train_step

MICRO = 8
CASES = {
    2: [{"data": 2}, {"fsdp": 2}, {"context": 2}, {"tensor": 2}],
    4: [
        {"fsdp": 2, "tensor": 2},
        {"data": 2, "context": 2},
        {"context": 2, "tensor": 2},
        {"context": 4},
    ],
}


def worst(mine: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], config: ModelConfig, share: Share) -> Any:
    """The largest |difference| - 1e-6 |value| of what lies here, and where."""
    table, found = cuts(config), (0.0, "")
    for name, tensor in mine.items():
        for part in parts(tensor, table.get(name), share):
            if part.tensor.numel():
                place = tuple(slice(a, a + n) for a, n in zip(part.offset, part.tensor.shape, strict=True))
                wanted = whole[name][place]
                assert wanted.shape == part.tensor.shape, name
                off = ((part.tensor - wanted).abs() - 1e-6 * wanted.abs()).max().item()
                found = max(found, (off, name))
    return found


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
    """Loss, gradients, their norm, and weights after two clipped steps."""
    alone, spread, source = model(config), model(config), Rows()
    batches = [source.batch(i) for i in range(MICRO)]
    loss, _ = accumulate(alone, CrossEntropy(), batches, learn=True)
    wanted = {name: p.grad.clone() for name, p in alone.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(wanted.values())).item()
    alone.zero_grad()
    adam = adamw(alone, OptimizerSettings())
    for _ in range(2):
        train_step(alone, CrossEntropy(), batches, adam, clip=norm / 3)
    with applied(spread, axes, recompute=recompute) as share:
        own = [batches[i] for i in share.mine(MICRO)]
        seen, _ = accumulate(spread, CrossEntropy(), own, learn=True)
        sums.finish(spread, share)
        here = {name: p.grad for name, p in spread.named_parameters() if p.grad is not None}
        off = worst(here, wanted, config, share)
        found = {"loss": abs(seen - loss), "gradient": off, "norm": abs(sums.norm(spread, share).item() / norm - 1)}
        spread.zero_grad()
        adam = adamw(spread, OptimizerSettings())
        for _ in range(2):
            train_step(spread, CrossEntropy(), own, adam, clip=norm / 3)
        after = worst(dict(spread.state_dict()), dict(alone.state_dict()), config, share)
        held = sum(local(p).nbytes for p in spread.parameters())
        everywhere = share.collect(found | {"weights": after, "same": sorted(here) == sorted(wanted), "held": held})
    return {key: max(one[key] for one in everywhere) for key in found} | {
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
