"""Every kernel against float64 and against `ops/torch`, on the device at hand: in half a minute, before timing.

Inputs are random and new each time. A kernel is compared with float64 on the same rounded inputs. In float32 its error
may be 1e-4; in bfloat16 1e-2, or three times that of `ops/torch` on them, but never more than 3e-2.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
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


def forms(device: torch.device) -> Iterator[tuple[Any, torch.dtype | None, torch.device]]:
    """The kernels, float64, and `ops/torch` on the device; kernels first, so that `gpu_prepare` meets them alone."""
    yield ops.gpu()[0], None, device
    yield vectorised, torch.float64, torch.device("cpu")
    yield vectorised, None, device


def one_token(name: str, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """`conv_step`, `ssd_step` or `mamba_step` on many sequences: errors of the kernel and of `ops/torch` against
    float64, of outputs and of what is kept.
    """
    if name == "mamba_step":
        return whole_layer(device, dtype)
    count, heads, groups, width, size = 9, 8, 2, 80, 128
    slots, results = torch.randperm(12)[:count], []
    if name == "conv_step":
        row, held = [v.to(dtype) for v in (normal(count, 256), normal(256, 4), normal(256))], normal(12, 3, 256)
    else:
        x, dt, rate, b, c, d, _ = scan_inputs(count, heads, groups, width, size, 1)
        row = [x.to(dtype), dt.float(), rate.float(), b.to(dtype), c.to(dtype), d.float()]
        held = normal(12, heads, width, size).float()
    for module, kind, place in forms(device):
        state = held.to(place, kind or (dtype if name == "conv_step" else torch.float32), copy=True)
        state = state.transpose(1, 2) if name == "conv_step" else state
        given = [v.to(place, kind or v.dtype) for v in row]
        y = getattr(module, name)(*given, state, slots.to(place))
        results.append([y.cpu().double(), state.cpu().double()])
    return error(results[0], results[1]), error(results[2], results[1])


def whole_layer(device: torch.device, dtype: torch.dtype, count: int = 9) -> tuple[float, float]:
    """A layer of the 9B's kind with two groups between its projections; twice, so that counters and tails are met
    again.
    """
    heads, groups, width, size = 8, 2, 80, 128
    inner, channels = heads * width, heads * width + 2 * groups * size
    row = [v.to(dtype) for v in (normal(count, inner + channels + heads), normal(channels, 4), normal(channels))]
    row += [normal(heads).float(), -normal(heads).exp().float(), normal(heads).float(), (1 + normal(inner)).to(dtype)]
    tails, states, results = normal(12, 3, channels), normal(12, heads, width, size).float(), []
    slots, next_z = torch.randperm(12)[:count], normal(count, row[0].shape[1]).to(dtype)
    for module, kind, place in forms(device):
        tail = tails.to(dtype).to(place, kind or dtype, copy=True).transpose(1, 2)
        state = states.to(place, kind or torch.float32, copy=True)
        given, found = [v.to(place, kind or v.dtype) for v in row], []
        for z in (given[0], next_z.to(place, kind or dtype)):
            y = module.mamba_step(z, *given[1:], tail, state, slots.to(place), groups, 1e-5, (0.001, 1.0))
            found.append(y.cpu().double())
        results.append([*found, tail.cpu().double(), state.cpu().double()])
    return error(results[0], results[1]), error(results[2], results[1])


def paged(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """As `one_token`, for one query over keys and values in blocks."""
    kernels = ops.gpu()[0]
    assert kernels is not None
    lengths, blocks = [1, 700, 16, 333], 200
    q, k, v = normal(4, 40, 128), normal(blocks, 16, 8, 128), normal(blocks, 16, 8, 128)
    table = torch.randperm(blocks)[: 4 * 45].view(4, 45)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    there = [t.to(device) for t in (q, k, v, table)]
    both = [[m.paged_attention(*there, lengths).cpu().double()] for m in (kernels, vectorised)]
    true = [vectorised.paged_attention(q.double(), k.double(), v.double(), table, lengths)]
    return error(both[0], true), error(both[1], true)


def half_state(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """A step over a float16 state, rounded at random: each number is a neighbour of the exact one, as often above as
    below, another seed rounds otherwise, and the outputs are those of the state that is kept (their errors are
    returned).
    """
    kernels = ops.gpu()[0]
    assert kernels is not None
    count, heads, groups, width, size = 9, 8, 2, 80, 128
    x, dt, rate, b, c, d, _ = scan_inputs(count, heads, groups, width, size, 1)
    row = [x.to(dtype), dt.float(), rate.float(), b.to(dtype), c.to(dtype), d.float()]
    held, slots = normal(count, heads, width, size).half(), torch.arange(count)
    exact, seeds = held.double(), torch.arange(count) * 4096
    found = []
    for more in (0, 1):
        state = held.to(device, copy=True)
        y = kernels.ssd_step(*(v.to(device) for v in row), state, slots.to(device), seed=(seeds + more).to(device))
        found.append((state.cpu().double(), y.cpu().double()))
    (state, y), (other, _) = found
    vectorised.ssd_step(*(v.double() for v in row), exact, slots)
    step = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2**-14))) - 10)
    off = (state - exact) / step
    far = ((state - exact).abs() - step).max()
    assert far < 2e-6, f"a number is {far:.1e} past its neighbours"  # float32's own errors where terms cancel
    spread = (1 / 6 / off.numel()) ** 0.5
    assert abs(off.mean()) < 6 * spread, f"rounding leans by {off.mean() / spread:.1f} of its spread"
    assert not state.equal(other), "another seed rounds as the first did"
    true = torch.einsum("sghpn,sgn->sghp", state.view(count, groups, -1, width, size), row[4].double()).reshape(x.shape)
    true = true + row[5].double()[:, None] * row[0].double()
    return error([y], [true]), 0.0


def draws(device: torch.device) -> tuple[float, float]:
    """Ids drawn on the device, on a GPU from a recorded graph whose numbers change: those that the host draws. Returns
    the share of rows that differ (none may).
    """
    from whimbrel.engine.graphs import record
    from whimbrel.engine.sampler import Draw, draw, kinds, numbers
    from whimbrel.engine.sampling import Sampling

    said = [Sampling(temperature=0), Sampling(temperature=1.0), Sampling(temperature=0.8, top_p=0.9),
            Sampling(temperature=1.2, top_k=40, min_p=0.05), Sampling(temperature=0.7, top_k=2000, top_p=0.5),
            Sampling(temperature=50.0, top_p=0.99), Sampling(temperature=0.9, repetition_penalty=1.3)]  # fmt: skip
    said = said[4:] + said[:4]  # of the rows that may be ordered whole (the first five) two need it
    logits, seen = 3 * torch.randn(28, 20_000), torch.rand(28, 20_000) < 0.3
    rows = [[Draw(said[row % len(said)], row, 0, position, seen[row]) for row in range(28)] for position in (5, 6)]
    there, sent, marked, kind = logits.to(device), numbers(rows[0]).to(device), seen.to(device), kinds(rows[0])
    kind = kind._replace(ordered=5)
    if device.type == "cuda":
        graph, ids = record(lambda: draw(there, sent, kind, marked))
    wrong = 0
    for batch in rows:
        sent.copy_(numbers(batch))
        if device.type == "cuda":
            graph.replay()
        else:
            ids = draw(there, sent, kind, marked)
        wrong += (ids.cpu() != draw(logits, numbers(batch), kind, seen)).sum().item()
    assert not wrong, f"{wrong} of {2 * len(logits)} draws differ from the host's"
    return 0.0, 0.0


def product(device: torch.device, dtype: torch.dtype, bits: int, count: int, small: bool) -> tuple[float, float]:
    """Weights of few bits in rows, inputs in parts: errors of the kernel and of `ops/torch`."""
    kernels = ops.gpu()[0]
    assert kernels is not None
    outputs, inputs = (37, 288) if small else (1111, 15680)
    there = packed.by_rows(packed.round_to_nearest(torch.randn(outputs, inputs, device=device), bits))
    assert there.scales is not None
    weight = replace(there, codes=there.codes.cpu(), scales=there.scales.cpu())
    x, bias = normal(count, inputs).to(dtype), normal(outputs).to(dtype)
    given = (x.to(device), there, bias.to(device))
    both = [[m.linear(*given).cpu().double()] for m in (kernels, vectorised)]
    true = [x.double() @ packed.unpack(weight).double().t() + bias.double()]
    return error(both[0], true), error(both[1], true)


def alive(device: torch.device) -> bool:
    """Does the device still answer? After an illegal access it does nothing more for this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception:
        return False
    return True


def against(
    device: torch.device, form: Any, inputs: list[Tensor], kept: set[int], dtype: torch.dtype
) -> tuple[float, float]:
    """Errors of the kernel and of `ops/torch` against float64, of outputs and gradients."""
    low = [v.float() if place in kept else v.to(dtype) for place, v in enumerate(inputs)]
    mine = run(form(ops.gpu()[0], device), [v.to(device, copy=True) for v in low])
    true = run(form(vectorised, torch.device("cpu")), [v.double() for v in low])
    plain = run(form(vectorised, device), [v.to(device, copy=True) for v in low])
    return error(mine, true), error(plain, true)


def listed(device: torch.device, small: bool = False) -> Iterator[tuple[str, Callable[[], tuple[float, float]]]]:
    """Every case and what runs it, by worth: bfloat16, which all rows need, in the order in which they need it."""
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(int(time.time()))
        word = str(dtype).removeprefix("torch.")
        for name in ("conv_step", "ssd_step", "mamba_step"):
            yield f"{name} {word}", partial(one_token, name, device, dtype)
        yield f"paged_attention {word}", partial(paged, device, dtype)
        for name, form, inputs, kept in cases(small, dtype):
            yield f"{name} {word}", partial(against, device, form, inputs, kept, dtype)
        if dtype == torch.bfloat16:
            yield "draw float32", partial(draws, device)
        yield f"ssd_step {word}, float16 state", partial(half_state, device, dtype)
        for bits in (8, 4):  # one row, some, many, and more than a kernel takes
            for rows in (1, 40, 70, 300) if dtype == torch.bfloat16 else (1, 40, 70):
                yield f"linear {word}, int{bits} x {rows}", partial(product, device, dtype, bits, rows, small)


def checks(
    device: torch.device, small: bool = False, end: float = float("inf"), skip: int = 0
) -> Iterator[dict[str, Any]]:
    """Run everything but the first `skip`, bfloat16 first: a record for each case, and one that sums up. None is begun
    after `end` (`time.perf_counter`), nor after one that broke this process: the last record then names it as `lost`.
    """
    kernels, begin, seen, bad, number = ops.gpu()[0], time.perf_counter(), 0, list[str](), 0
    if kernels is None:
        yield {"ok": False, "failed": f"no Triton: {ops.gpu()[1]}"}
        return
    for label, function in listed(device, small):
        number += 1
        if number <= skip:
            continue
        if time.perf_counter() > end:
            bad.append(f"{label} (no time)")
            continue
        found = judged(label, function)
        seen, bad = seen + 1, bad + [label] * (not found["ok"])
        yield found
        if not found["ok"] and not alive(device):
            yield {"ok": False, "lost": label}
            return
    yield {"ok": not bad, "cases": seen, "wrong": bad, "seconds": time.perf_counter() - begin}


def judged(label: str, function: Callable[[], tuple[float, float]]) -> dict[str, Any]:
    """A case's record: the kernel's error, that of `ops/torch`, and whether it may be."""
    try:
        mine, plain = function()
    except Exception as fault:
        return {"case": label, "ok": False, "failed": f"{type(fault).__name__}: {str(fault)[:300]}"}
    most = 1e-4 if "float32" in label else 3e-2
    good = mine < max(most if "float32" in label else 1e-2, min(3 * plain, most))
    said = {"case": label, "ok": good, "error": mine, "torch": plain}
    return said if good else said | {"failed": f"error {mine:.2e}, ops/torch {plain:.2e}"}
