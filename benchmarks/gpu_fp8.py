"""FP8 on the device: noise of a layer in each recipe, whether our assertions agree with what it refuses, losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from whimbrel import ops
from whimbrel.ops import fp8, packed
from whimbrel.ops.fp8 import E4M3, E5M2, Scaled, check_layout, quantise
from whimbrel.train import precision

RECIPES = ("tensorwise", "rowwise", "blockwise")
KINDS = (
    ("tensor", "tensor", E4M3),
    ("tensor", "tensor", E5M2),
    ("row", "row", E4M3),
    ("block", "square", E4M3),
    ("block", "block", E4M3),
)


def noise(place: Any) -> Iterator[dict[str, Any]]:
    """Signal over noise of output and gradients against float64 (thresholds: 18 and 17 dB; blockwise output 25)."""
    tokens, into, out = (32, 128, 144) if place.dry else (4096, 4480, 15680)
    for recipe in RECIPES:
        leaves = [torch.randn(n, into, device=place.device, dtype=place.dtype).requires_grad_() for n in (tokens, out)]
        y = precision.linear(leaves[0], leaves[1], None, recipe)
        up = torch.randn_like(y)
        found = [y, *torch.autograd.grad(y, leaves, up)]
        x, w, u = (v.detach().double() for v in (*leaves, up))
        true = [x @ w.t(), u @ w, u.t() @ x]
        gains = [20 * torch.log10(t.norm() / (f.double() - t).norm()).item() for f, t in zip(found, true, strict=True)]
        good = gains[0] > (25 if recipe == "blockwise" else 18) and min(gains[1:]) > 17
        yield {"what": "noise", "recipe": recipe, "output_db": gains[0], "gradient_db": gains[1:], "ok": good}


def decoding(place: Any) -> Iterator[dict[str, Any]]:
    """A product of decoding, of one row and of 64: signal over noise (18 dB), and the error beside what was rounded."""
    into, out = (128, 37) if place.dry else (15680, 4480)
    weight = torch.randn(out, into, device=place.device, dtype=place.dtype)
    held = fp8.weight(weight)
    for tokens in (1, 64):
        x = torch.randn(tokens, into, device=place.device, dtype=place.dtype)
        y, true = ops.linear(x, held).double(), x.double() @ weight.double().t()
        rounded = quantise(x, "row").wide().double() @ packed.unpack(held).double().t()
        gain, apart = (20 * torch.log10(true.norm() / (true - y).norm()), (y - rounded).norm() / rounded.norm())
        yield {"what": "decoding", "tokens": tokens, "output_db": gain.item(), "error": apart.item(),
               "ok": bool(gain > 18 and apart < 1e-2)}  # fmt: skip


def layouts(place: Any) -> Iterator[dict[str, Any]]:
    """Which products are native; and operands that break one rule each: each should be refused by both."""
    for kind_a, kind_b, dtype in KINDS:
        said = fp8.native(place.device, kind_a, kind_b, dtype, E4M3)
        yield {
            "what": "native",
            "kinds": f"{kind_a} x {kind_b}",
            "dtype": str(dtype),
            "native": not said,
            "said": said[:200],
        }
    a, b = (quantise(torch.randn(n, 256, device=place.device), "tensor") for n in (64, 48))
    broken: dict[str, tuple[Scaled, Scaled]] = {
        "columns not a multiple of 16": (a, quantise(torch.randn(40, 256, device=place.device), "tensor")),
        "sum not a multiple of 16": tuple(  # type: ignore[dict-item]
            quantise(torch.randn(n, 264, device=place.device), "tensor") for n in (64, 48)
        ),
        "both E5M2": tuple(  # type: ignore[dict-item]
            quantise(torch.randn(n, 256, device=place.device), "tensor", E5M2) for n in (64, 48)
        ),
        "nothing": (a, b),
    }
    for rule, pair in broken.items():
        refusals: list[bool] = []
        for attempt in (lambda p=pair: check_layout(*p), lambda p=pair: fp8._scaled_mm(*p, torch.bfloat16)):
            try:
                attempt()
                refusals.append(False)
            except (AssertionError, RuntimeError, ValueError):
                refusals.append(True)
        # The device may take more than we allow, never less.
        yield {"what": "layout", "broken": rule, "we_refuse": refusals[0], "device_refuses": refusals[1],
               "ok": refusals[0] or not refusals[1]}  # fmt: skip


class Source:
    """Rows of tokens that can be learned: every id is followed by one of 8 others, each as often; the floor is ln 8."""

    def __init__(self, vocabulary: int, tokens: int) -> None:
        self.random = np.random.default_rng(0)
        self.next, self.tokens = self.random.integers(0, vocabulary, (vocabulary, 8)), tokens

    def row(self, kind: Callable[..., Any]) -> Any:
        ids, turns = [int(self.random.integers(len(self.next)))], self.random.integers(0, 8, self.tokens)
        for turn in turns:
            ids.append(int(self.next[ids[-1], turn]))
        return kind(np.array(ids[:-1]), np.array(ids[1:]), (self.tokens // 2,) * 2)


def curves(place: Any, trainer: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Losses of a small hybrid in each recipe beside bfloat16: same weights, same fresh rows, for as long as the row
    may last, the recipes in turns. Scored on one row that none learns from.
    """
    from dataclasses import replace

    from whimbrel.model.presets import preset
    from whimbrel.train.objective import CrossEntropy
    from whimbrel.train.step import accumulate

    config = replace(preset("hybrid-290m"), vocab_size=4096)
    config = replace(place.shape(config), hidden_size=128, intermediate_size=128) if place.dry else config
    tokens, every = (32, 1) if place.dry else (4096, 100)
    source = Source(config.vocab_size, tokens)
    made = {name: trainer(place, config, tokens, 2, False, name, 1) for name in ("none", *RECIPES)}
    held, done, failed = source.row(type(made["none"][2])), 0, dict[str, str]()
    most, round_seconds = (2 if place.dry else 5000), 0.0
    while done < most and place.left > 1.2 * round_seconds:
        begin, rows, losses = time.perf_counter(), [source.row(type(held)) for _ in range(every)], dict[str, float]()
        for name, (step, model, _) in made.items():
            if name in failed:
                continue
            try:
                for row in rows:
                    step(row)
                with torch.no_grad():
                    losses[name] = accumulate(model, CrossEntropy(), [held], learn=False)[0]
            except Exception as fault:
                failed[name] = f"{type(fault).__name__}: {str(fault)[:300]}"
                yield {"what": "curve", "recipe": name, "steps": done, "failed": failed[name]}
        done, round_seconds = done + every, time.perf_counter() - begin
        over = {name: loss - losses["none"] for name, loss in losses.items() if "none" in losses}
        yield {"what": "curve", "steps": done, "losses": losses, "over_bfloat16": over, "floor": math.log(8)}
