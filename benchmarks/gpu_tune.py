"""Find launch settings on the GPU at hand and save them as its table (`ops/triton/tables`).

Run: python benchmarks/gpu_tune.py [--seconds 120] [--out FILE]. Each kernel is timed at the shapes of the 8B, 9B, 56B
over a small grid of settings; one that does not compile or fit is skipped. The best replace those in the table.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from whimbrel import ops
from whimbrel.ops import Segments
from whimbrel.ops.packed import Packed
from whimbrel.ops.triton import launch

BF16 = torch.bfloat16


def grid(**choices: tuple[int, ...]) -> Iterator[dict[str, int]]:
    """Every combination."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def work(kernel: str, width: int, size: int) -> tuple[Callable[[], object], Iterator[dict[str, int]]]:
    """What to time for a kernel, and the settings to try."""
    heads, groups, tokens, device = (256 if size == 256 else 128), 8, 8192, "cuda"
    if kernel.startswith("scan"):
        x = torch.randn(tokens, heads, width, device=device, dtype=BF16).requires_grad_()
        b = torch.randn(tokens, groups, size, device=device, dtype=BF16).requires_grad_()
        dt, a = torch.rand(tokens, heads, device=device) * 0.1, -torch.rand(heads, device=device) * 16
        cut = Segments.of([tokens], device=device)

        def forward() -> torch.Tensor:
            return ops.ssd(x, dt, a, b, b, a, cut)[0]

        def both() -> object:
            return torch.autograd.grad(forward(), (x, b), x.detach())

        if kernel == "scan":
            return both, grid(piece=(256, 512, 1024, 2048), chunk=(64, 128), num_warps=(4, 8), num_stages=(1, 2, 3))
        return both, grid(num_warps=(4, 8), num_stages=(1, 2, 3))
    if kernel == "ssd_step":
        rows = 64
        state, slots = torch.randn(rows, heads, width, size, device=device), torch.arange(rows, device=device)
        x = torch.randn(rows, heads, width, device=device, dtype=BF16)
        b, dt = torch.randn(rows, groups, size, device=device, dtype=BF16), torch.rand(rows, heads, device=device)
        a = -torch.ones(heads, device=device)
        return lambda: ops.ssd_step(x, dt, a, b, b, a, state, slots), grid(
            width=(8, 16, 32, 64), num_warps=(1, 2, 4, 8)
        )
    if kernel == "mamba_step":
        rows, inner, channels = 8, heads * width, heads * width + 2 * groups * size
        given = [torch.randn(rows, inner + channels + heads, device=device, dtype=BF16)]
        given += [torch.randn(channels, 4, device=device, dtype=BF16), torch.randn(channels, device=device, dtype=BF16)]
        given += [
            torch.randn(heads, device=device),
            -torch.ones(heads, device=device),
            torch.ones(heads, device=device),
        ]
        given += [torch.ones(inner, device=device, dtype=BF16)]
        given += [torch.randn(rows, 3, channels, device=device, dtype=BF16).transpose(1, 2)]
        given += [torch.randn(rows, heads, width, size, device=device), torch.arange(rows, device=device)]
        return lambda: ops.mamba_step(*given, groups, 1e-5), grid(
            width=(8, 16, 32), num_warps=(2, 4, 8), programs=(528, 1056, 2112)
        )
    if kernel.startswith("linear"):  # int8, 16 or 256 rows; `width` outputs and `size` inputs
        codes = torch.randint(-127, 128, (width, size), device=device, dtype=torch.int8)
        scales = torch.rand(size // 32, width, device=device, dtype=torch.float16).t()
        weight = Packed(codes, scales, (width, size), 8, 32, "rows")
        x = torch.randn(256 if kernel == "linear_wide" else 16, size, device=device, dtype=BF16)
        if kernel == "linear_wide":  # `rows` 0: unpacked, as prompts are
            return lambda: ops.linear(x, weight), grid(
                rows=(256, 0), outputs=(64, 128), programs=(128, 256, 512), num_warps=(4, 8), num_stages=(2, 3, 4)
            )
        return lambda: ops.linear(x, weight), grid(
            rows=(64,), outputs=(32, 64, 128), programs=(264, 528, 1056), num_warps=(2, 4, 8), num_stages=(2, 4, 6)
        )
    assert kernel == "paged", kernel
    keys = torch.randn(16 * 1024, 16, 8, 128, device=device, dtype=BF16)
    q = torch.randn(16, 40, 128, device=device, dtype=BF16)
    table, lengths = torch.arange(16 * 1024, device=device).view(16, 1024), torch.full((16,), 16000, device=device)
    choices = grid(split=(256, 512, 1024, 2048), tile=(32, 64, 128), num_warps=(2, 4, 8), num_stages=(2, 3))
    return lambda: ops.paged_attention(q, keys, keys, table, lengths), choices


def best(kernel: str, width: int, size: int, end: float) -> tuple[dict[str, int] | None, float, float]:
    """The fastest settings, their milliseconds, and those of the present table."""
    run, choices = work(kernel, width, size)
    now = triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median")
    chosen, least = None, now
    for values in choices:
        if time.perf_counter() > end:
            break
        try:
            with launch.trial(kernel, values):
                took = triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
        except Exception:  # does not compile, or needs more shared memory than there is
            continue
        if took < 0.98 * least:
            chosen, least = values, took
    return chosen, least, now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--out", type=Path, default=launch.TABLES / f"{launch.device_name()}.json")
    said = parser.parse_args()
    table: dict[str, Any] = copy.deepcopy(launch.table(launch.device_name()))
    names = ("mamba_step", "ssd_step", "scan", "scan_walk", "scan_reading", "scan_writing")
    cases = [(kernel, *shape) for kernel in names
             for shape in ((64, 128), (80, 128), (64, 256))] + [("paged", 128, 0)]  # fmt: skip
    cases += [(kernel, *shape) for kernel in ("linear", "linear_wide")
              for shape in ((4480, 15680), (15680, 4480), (22656, 4480), (4480, 10240))]  # fmt: skip
    begin = time.perf_counter()
    for number, (kernel, width, size) in enumerate(cases):
        end = begin + said.seconds * (number + 1) / len(cases)
        chosen, least, now = best(kernel, width, size, end)
        shape = f"E={width}" if kernel == "paged" else f"P={width},N={size}"
        shape = f"O={width},I={size}" if kernel.startswith("linear") else shape
        print(f"{kernel:<14} {shape:<14} {now:8.3f} ms -> {least:8.3f} ms {chosen or 'as it is'}", flush=True)
        if chosen:
            table["kernels"][kernel][shape] = chosen
            table["origin"] = f"measured {time.strftime('%Y-%m-%d')} with benchmarks/gpu_tune.py"
            table["device"] = torch.cuda.get_device_name()
            said.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
            launch._found.cache_clear()
            launch.table.cache_clear()


if __name__ == "__main__":
    main()
