"""Every kernel against float64 and against `ops/torch`, on the device at hand: in half a minute, before timing.

Inputs are random and new each time. A kernel is compared with float64 on the same rounded inputs. In float32 its error
may be 1e-4; in bfloat16 1e-2, or three times that of `ops/torch` on them, but never more than 3e-2.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whimbrel import ops
from whimbrel.ops import Segments, packed, vectorised

Case = tuple[str, Callable[[Any, torch.device], Callable[..., Sequence[Tensor]]], list[Tensor], set[int]]
LENGTHS, SHORT = [5, 0, 300, 1, 94], [3, 0, 17, 1]
"""Tokens of each sequence; the second on a CPU, where kernels are interpreted."""


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scan_inputs(tokens: int, heads: int, groups: int, width: int, size: int, sequences: int) -> list[Tensor]:
    dt = torch.nn.functional.softplus(normal(tokens, heads) - 3)
    rate = -(1 + 15 * torch.rand(heads, dtype=torch.float64))
    vectors = [normal(tokens, groups, size) for _ in range(2)]
    return [normal(tokens, heads, width), dt, rate, *vectors, normal(heads), normal(sequences, heads, width, size)]


def scan(width: int, size: int, lengths: list[int]) -> Case:
    keep = (2, 9, sum(lengths) - 2)

    def form(module: Any, device: torch.device) -> Callable[..., Sequence[Tensor]]:
        cut = Segments.of(lengths, device=device)
        return lambda *v: module.ssd(*v[:6], cut, v[6], keep)

    inputs = scan_inputs(sum(lengths), 4, 2, width, size, len(lengths))
    return f"scan {width}x{size}", form, inputs, {1, 2, 5, 6}


def cases(small: bool, dtype: torch.dtype) -> list[Case]:
    """Name, form, inputs in float64, and which of these stay float32. In float32 the scan has one shape alone:
    the kernels take no wider ones, and compile slowly.
    """
    scans = [(64, 128), (80, 128), (64, 256)] if dtype == torch.bfloat16 else [(64, 128)]
    lengths, wide = (SHORT, 256) if small else (LENGTHS, 4480)
    tokens, longer = sum(lengths), [n + 7 * (n > 0) for n in lengths]
    targets = torch.randint(0, 999, (tokens,))
    targets[::5] = -100
    angles = normal(tokens, 64)
    rotation = [angles.cos().float(), angles.sin().float()]

    def conv(module: Any, device: torch.device) -> Callable[..., Sequence[Tensor]]:
        cut = Segments.of(lengths, device=device)
        return lambda x, w, b, h: module.conv(x, w, b, cut, h)

    def plain(name: str, *rest: Any) -> Callable[[Any, torch.device], Callable[..., Sequence[Tensor]]]:
        return lambda module, device: (
            lambda *v: [getattr(module, name)(*v, *(r.to(device) if isinstance(r, Tensor) else r for r in rest))]
        )

    def attention(module: Any, device: torch.device) -> Callable[..., Sequence[Tensor]]:
        cut, more = (Segments.of(v, device=device) for v in (lengths, longer))
        return lambda q, k, v: [module.attention(q, k, v, cut, more)]

    keys = sum(longer)
    return [
        ("rms_norm", plain("rms_norm", 1e-5), [normal(tokens, wide), 1 + normal(wide)], set()),
        ("gated_norm", plain("gated_norm", 4, 1e-5), [normal(tokens, wide), normal(tokens, wide), normal(wide)], set()),
        ("relu2", plain("relu2"), [normal(tokens, wide)], set()),
        ("swiglu", plain("swiglu"), [normal(tokens, wide), normal(tokens, wide)], set()),
        ("step_size", plain("step_size", (0.0, float("inf"))), [3 * normal(tokens, 128), normal(128)], set()),
        ("rotary", plain("rotary", *rotation), [normal(tokens, 8, 128)], set()),
        ("conv", conv, [normal(tokens, wide), normal(wide, 4), normal(wide), normal(len(lengths), wide, 3)], set()),
        *(scan(*sizes, lengths) for sizes in ([(20, 16)] if small else scans)),
        ("attention", attention, [normal(tokens, 8, 128), normal(keys, 2, 128), normal(keys, 2, 128)], set()),
        ("cross_entropy", plain("cross_entropy", targets), [normal(tokens, 64), 0.1 * normal(999, 64)], set()),
        (
            "kl",
            plain("kl"),
            [normal(tokens, 64), 0.1 * normal(999, 64), normal(tokens, 32), 0.1 * normal(999, 32)],
            set(),
        ),
    ]


def run(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of a fixed random sum of them, in float64 on the CPU."""
    leaves = [v.requires_grad_() for v in inputs]
    outputs = [y for y in function(*leaves) if y.numel()]
    weights = []
    for place, y in enumerate(outputs):
        torch.manual_seed(place)
        weights.append(torch.randn(y.shape, dtype=torch.float64).to(y))
    total = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)  # type: ignore[arg-type]
    found = [*outputs, *(g for g in gradients if g is not None)]
    return [v.detach().cpu().double() for v in found]


def error(got: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """The largest ‖got - true‖ / ‖true‖; infinite where a number is not finite."""
    worst = 0.0
    for g, t in zip(got, true, strict=True):
        relative = ((g - t).norm() / t.norm().clamp(min=1e-6)).item()
        worst = max(worst, relative if relative == relative else float("inf"))
    return worst


def steps(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """One token of many sequences: convolution, scan and paged attention against float64 and `ops/torch`."""
    kernels, found = ops.gpu()[0], {}
    assert kernels is not None
    count, heads, groups, width, size = 9, 8, 2, 80, 128
    x, dt, rate, b, c, d, _ = scan_inputs(count, heads, groups, width, size, 1)
    slots = torch.randperm(12)[:count]
    states = {"conv_step": normal(12, 3, 256).float(), "ssd_step": normal(12, heads, width, size).float()}
    rows: dict[str, list[Tensor]] = {
        "conv_step": [v.to(dtype) for v in (normal(count, 256), normal(256, 4), normal(256))],
        "ssd_step": [x.to(dtype), dt.float(), rate.float(), b.to(dtype), c.to(dtype), d.float()],
    }
    for name, row in rows.items():
        results = []
        for module, kind, place in (
            (vectorised, torch.float64, "cpu"),
            (kernels, None, device),
            (vectorised, None, device),
        ):
            state = states[name].to(place, kind or torch.float32, copy=True)
            state = state.transpose(1, 2) if name == "conv_step" else state
            state = state.to(dtype) if name == "conv_step" and kind is None else state
            given = [v.to(place, kind or v.dtype) for v in row]
            y = getattr(module, name)(*given, state, slots.to(place))
            results.append([y.cpu().double(), state.cpu().double()])
        found[name] = (error(results[1], results[0]), error(results[2], results[0]))
    lengths, blocks = [1, 700, 16, 333], 200
    q, k, v = normal(4, 40, 128), normal(blocks, 16, 8, 128), normal(blocks, 16, 8, 128)
    table = torch.randperm(blocks)[: 4 * 45].view(4, 45)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    true = [vectorised.paged_attention(q.double(), k.double(), v.double(), table, lengths)]
    there = [t.to(device) for t in (q, k, v, table)]
    both = [[m.paged_attention(*there, lengths).cpu().double()] for m in (kernels, vectorised)]
    found["paged_attention"] = (error(both[0], true), error(both[1], true))
    return found


def products(device: torch.device, dtype: torch.dtype, small: bool) -> dict[str, tuple[float, float]]:
    """Weights of 8 and 4 bits in rows: one row, some, and more than the kernel takes; inputs in parts."""
    kernels, found = ops.gpu()[0], {}
    assert kernels is not None
    outputs, inputs = (37, 288) if small else (1111, 15680)
    for bits in (8, 4):
        weight = packed.by_rows(packed.round_to_nearest(normal(outputs, inputs).float(), bits))
        assert weight.scales is not None
        there = replace(weight, codes=weight.codes.to(device), scales=weight.scales.to(device))
        for count in (1, 40, 70):
            x, bias = normal(count, inputs).to(dtype), normal(outputs).to(dtype)
            true = [x.double() @ packed.unpack(weight).double().t() + bias.double()]
            both = [[m.linear(x.to(device), there, bias.to(device)).cpu().double()] for m in (kernels, vectorised)]
            found[f"linear int{bits} x {count}"] = (error(both[0], true), error(both[1], true))
    return found


def check(device: torch.device, small: bool = False) -> dict[str, Any]:
    """Run everything: errors by case and dtype, what failed, and the seconds it took."""
    kernels, begin = ops.gpu()[0], time.perf_counter()
    if kernels is None:
        return {"ok": False, "failed": {"triton": ops.gpu()[1]}, "errors": {}, "seconds": 0.0}
    errors: dict[str, tuple[float, float]] = {}
    failed: dict[str, str] = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(int(time.time()))
        word = str(dtype).removeprefix("torch.")
        for name, form, inputs, kept in cases(small, dtype):
            label = f"{name} {word}"
            low = [v.float() if place in kept else v.to(dtype) for place, v in enumerate(inputs)]
            try:
                true = run(form(vectorised, torch.device("cpu")), [v.double() for v in low])
                mine = run(form(kernels, device), [v.to(device, copy=True) for v in low])
                plain = run(form(vectorised, device), [v.to(device, copy=True) for v in low])
                errors[label] = (error(mine, true), error(plain, true))
            except Exception as fault:
                failed[label] = f"{type(fault).__name__}: {str(fault)[:300]}"
        for part, form in (("steps", steps), ("linear", partial(products, small=small))):
            try:
                errors |= {f"{name} {word}": pair for name, pair in form(device, dtype).items()}
            except Exception as fault:
                failed[f"{part} {word}"] = f"{type(fault).__name__}: {str(fault)[:300]}"
    for label, (mine, plain) in errors.items():
        most = 1e-4 if label.endswith("float32") else 3e-2
        if not mine < max(most if label.endswith("float32") else 1e-2, min(3 * plain, most)):
            failed[label] = f"error {mine:.2e}, ops/torch {plain:.2e}"
    return {"ok": not failed, "failed": failed, "errors": errors, "seconds": time.perf_counter() - begin}
