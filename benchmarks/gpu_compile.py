"""Compile kernels for an H200 (sm_90) without a GPU; print what ptxas says: registers, shared memory, spills.

Run: python benchmarks/gpu_compile.py [scan,steps,rows,fewbits]. Nothing is launched: the driver only names the target.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from whimbrel import ops
from whimbrel.ops import Segments

SHOWN = ("HALF", "C", "P", "BP", "BN", "BO", "BM", "WIDE", "GROUP", "BITS", "BLOCK", "R")
SHOWN += ("REVERSE", "STORE", "BACKWARD", "num_warps", "num_stages")
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
BF16 = torch.bfloat16
compiled: list[dict[str, Any]] = []


class Target:
    """A driver without a device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only() -> None:
    """From now on a launch compiles, reports and returns."""
    driver.set_active(Target())
    run = JITFunction.run

    def report(self: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **settings)
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(kernel.asm["ptx"])
            file.flush()
            command = [str(PTXAS), "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
            said = subprocess.run(command, capture_output=True, text=True).stderr
        registers = re.search(r"Used (\d+) registers", said)
        found = {
            "kernel": f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}",
            "settings": ",".join(f"{name}={settings[name]}" for name in SHOWN if name in settings),
            "registers": int(registers[1]) if registers else -1,
            "shared": kernel.metadata.shared,
            "spills": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        }
        compiled.append(found)
        print(
            f"{found['kernel']:<24} {found['settings']:<70} registers {found['registers']:>4}"
            f" shared {found['shared']:>7} spills {found['spills']:>5}",
            flush=True,
        )
        return kernel

    JITFunction.run = report


def scan(kernels: Any) -> None:
    """The scan of the 8B, the 9B and the 56B."""
    for width, size in ((64, 128), (80, 128), (64, 256)):
        tokens, heads, groups = 1024, 16, 2
        x, b = torch.empty(tokens, heads, width, dtype=BF16), torch.empty(tokens, groups, size, dtype=BF16)
        dt, a = torch.empty(tokens, heads), torch.empty(heads)
        leaves = [v.requires_grad_() for v in (x, dt, a, b, b.clone(), a.clone())]
        kernels.ssd(*leaves, Segments.of([tokens]))[0].sum().backward()
        kernels.ssd(*(v[:512] if len(v) == tokens else v for v in leaves), Segments.of([512]))  # one piece


def steps(kernels: Any) -> None:
    """Decoding: convolution, state, attention."""
    x, slots = torch.empty(8, 12288, dtype=BF16), torch.zeros(8, dtype=torch.int64)
    kernels.conv_step(
        x, torch.empty(12288, 4, dtype=BF16), None, torch.empty(9, 3, 12288, dtype=BF16).transpose(1, 2), slots
    )
    row = [torch.empty(8, 128, 80, dtype=BF16), torch.empty(8, 128), torch.empty(128)]
    row += [torch.empty(8, 8, 128, dtype=BF16), torch.empty(8, 8, 128, dtype=BF16), torch.empty(128)]
    for kind in (torch.float32, torch.float16):
        kernels.ssd_step(*row, torch.empty(9, 128, 80, 128, dtype=kind), slots, seed=torch.ones(8, dtype=torch.int64))
    for heads, width, size in ((128, 80, 128), (128, 64, 128), (256, 64, 256)):
        inner, channels = heads * width, heads * width + 16 * size
        given = [torch.empty(8, inner + channels + heads, dtype=BF16), torch.empty(channels, 4, dtype=BF16)]
        given += [torch.empty(channels, dtype=BF16), *(torch.empty(heads) for _ in range(3))]
        given += [torch.empty(inner, dtype=BF16), torch.empty(9, 3, channels, dtype=BF16).transpose(1, 2)]
        for kind in (torch.float32, torch.float16):
            state = torch.empty(9, heads, width, size, dtype=kind)
            kernels.mamba_step(*given, state, slots, 8, 1e-5, seed=torch.ones(8, dtype=torch.int64))
    keys = torch.empty(64, 16, 8, 128, dtype=BF16)
    table = torch.zeros(8, 64, dtype=torch.int64)
    kernels.paged_attention(torch.empty(8, 40, 128, dtype=BF16), keys, keys, table, slots)


def rows(kernels: Any) -> None:
    """Norms, activations, convolution, losses, casts: forward and backward."""
    from whimbrel.ops.triton import quantise

    x = torch.empty(64, 10240, dtype=BF16).requires_grad_()
    weight = torch.empty(10240, dtype=BF16).requires_grad_()
    kernels.rms_norm(x[:, :4480], weight[:4480], 1e-5).sum().backward()
    kernels.gated_norm(x, x, weight, 8, 1e-5).sum().backward()
    kernels.relu2(x).sum().backward()
    kernels.swiglu(x, x).sum().backward()
    kernels.step_size(x[:, :128], weight[:128], (0.0, float("inf"))).sum().backward()
    taps = torch.empty(10240, 4, dtype=BF16).requires_grad_()
    history = torch.empty(1, 10240, 3, dtype=BF16).requires_grad_()
    kernels.conv(x, taps, weight, Segments.of([64]), history)[0].sum().backward()
    angles = torch.empty(64, 64)
    kernels.rotary(x.view(64, 80, 128), angles, angles).sum().backward()
    hidden, vocabulary = torch.zeros(8, 64, dtype=BF16).requires_grad_(), torch.zeros(131072, 64, dtype=BF16)
    kernels.cross_entropy(hidden, vocabulary, torch.zeros(8, dtype=torch.int64)).sum().backward()
    kernels.kl(hidden, vocabulary, hidden, vocabulary).sum().backward()
    quantise.by_blocks(x.detach(), relu2=True)
    quantise.by_tensor(x.detach(), torch.ones(()))


def fewbits(kernels: Any) -> None:
    """Products of the 9B with weights of 8 and 4 bits: few rows, many, prompts; inputs in parts; rows to FP8."""
    from whimbrel.ops.packed import Packed
    from whimbrel.ops.triton import quantise

    quantise.by_rows(torch.empty(8, 15680, dtype=BF16))
    for bits in (8, 4):
        for outputs, inputs, rows, group in ((4480, 15680, 1, 32), (4480, 15680, 64, 32), (131072, 4480, 16, 32),
                                             (4480, 15680, 65, 32), (131072, 4480, 256, 32), (4480, 15616, 256, 64),
                                             (4480, 15616, 256, 128), (512, 4480, 257, 32)):  # fmt: skip
            codes = torch.empty(outputs, inputs * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
            scales = torch.empty(inputs // group, outputs, dtype=torch.float16).t()
            weight = Packed(codes, scales, (outputs, inputs), bits, group, "rows")
            kernels.linear(torch.empty(rows, inputs, dtype=BF16), weight)


def main() -> int:
    compile_only()
    kernels, why = ops.gpu()
    assert kernels is not None, why
    parts = {"scan": scan, "steps": steps, "rows": rows, "fewbits": fewbits}
    for name in (sys.argv[1] if len(sys.argv) > 1 else "scan,steps,rows,fewbits").split(","):
        parts[name](kernels)
    return 1 if any(found["shared"] > 227 * 1024 for found in compiled) else 0


if __name__ == "__main__":
    sys.exit(main())
